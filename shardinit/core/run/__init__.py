"""Executables, and the arrays that they make."""
