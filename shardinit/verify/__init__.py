"""What can be said about weights, and checked: audits, digests and receipts.

>>> import jax, shardinit
>>> weights = {"w": jax.numpy.zeros((8, 32))}
>>> len(shardinit.digest(weights).root)  # equal on every mesh
64
"""
