"""Matrices, and what they become with a prior."""
