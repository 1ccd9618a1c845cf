"""From a key to a sharded pytree; knows JAX, no framework, no network."""
