"""What the data determine, where to measure, how far to trust a posterior."""
