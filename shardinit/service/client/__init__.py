"""The client of the init service."""
