"""What is inferred: data, a likelihood, a prior."""
