"""From a first guess or a training loop to an optimum."""
