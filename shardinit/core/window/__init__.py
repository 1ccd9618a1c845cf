"""Any window of a leaf, computed alone."""
