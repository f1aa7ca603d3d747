"""From an optimum to a posterior, and its evidence."""
