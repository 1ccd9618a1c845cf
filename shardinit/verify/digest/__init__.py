"""Digests of leaves, equal on every mesh."""
