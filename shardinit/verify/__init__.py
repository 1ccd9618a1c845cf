"""What can be said about weights, and checked: audits, digests and receipts."""
