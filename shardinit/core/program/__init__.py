"""An init function as a file of kilobytes."""
