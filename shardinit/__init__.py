"""Sharded parameter initialisation for JAX: initial weights as a program."""
