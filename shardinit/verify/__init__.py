"""What can be said about weights, and checked: digests and receipts."""
