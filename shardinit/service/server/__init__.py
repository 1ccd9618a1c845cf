"""The server of the init service."""
