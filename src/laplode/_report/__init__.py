"""Results for ArviZ, pictures, NUTS, files."""
