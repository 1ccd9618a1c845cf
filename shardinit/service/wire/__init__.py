"""What both sides of the service speak: messages, limits, errors."""
