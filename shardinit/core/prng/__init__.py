"""Keys: how they are derived, and the random bits at any counter of one."""
