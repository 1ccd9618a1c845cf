"""What changed between two initialisations, and one pinned in a file."""
