"""A file for each picture."""
