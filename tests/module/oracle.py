"""What the documented order of initialisation is checked against: plain JAX."""

import jax


def sequence(key):
    """``key, state = split(state)``: the keys in the order in which they are taken."""
    state = jax.random.key(key) if isinstance(key, int) else key
    while True:
        key, state = jax.random.split(state)
        yield key


def uniform(key, *shape):
    """One draw, as plain ``jax.jit`` compiles it."""
    return _uniform(key, shape)


_uniform = jax.jit(jax.random.uniform, static_argnums=1)
