"""Models: the ready-made one, those of users, and their parameters as a vector."""
