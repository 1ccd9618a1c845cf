"""Messages generated from ``protos/shardinit/v1``; see the comments there."""
