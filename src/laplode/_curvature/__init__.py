"""The curvature of the negative log-likelihood."""
