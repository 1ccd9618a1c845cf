"""Checkpoints: Orbax for jobs, safetensors for everyone."""
