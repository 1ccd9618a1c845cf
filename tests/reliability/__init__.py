"""How much the service bears. Each module is a command, and its short form a test."""
