"""Every snippet of the document that this room was built from, its slips mended.

(A parenthesis too many and a ``key`` that nothing defines, in ``rng_init``.)
"""

from typing import Optional, Union

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shardinit import module as tx
from tests.module.oracle import sequence, uniform

pytestmark = pytest.mark.once


class Field(tx.Module):
    a: Union[tx.Initializer, jnp.ndarray] = tx.Parameter.node()  # noqa: UP007

    def __init__(self):
        self.a = tx.Initializer(lambda key: jax.random.uniform(key, shape=(1,)))


class RngInit(tx.Module):
    a: Optional[jnp.ndarray] = tx.Parameter.node()  # noqa: UP045
    b: Optional[jnp.ndarray] = tx.Parameter.node()  # noqa: UP045

    def __init__(self):
        self.a = None
        self.b = None

    def rng_init(self):
        self.a = jax.random.uniform(tx.next_key(), shape=(1,))
        self.b = 10.0 * self.a + jax.random.normal(tx.next_key(), shape=(1,))


class Linear(tx.Module):
    w: Optional[jnp.ndarray] = tx.Parameter.node()  # noqa: UP045

    def __init__(self, features_out: int):
        self.features_out = features_out
        self.w = None

    def __call__(self, x: jnp.ndarray) -> jnp.ndarray:
        if self.initializing():
            self.w = jax.random.uniform(
                key=tx.next_key(), shape=[x.shape[-1], self.features_out]
            )
        return x @ self.w


def test_initializing_sees_the_shape_of_the_input():
    before = Linear(32)
    after = before.init(42, jnp.ones((2, 4)))
    assert before.w is None
    assert not before.initialized
    assert after.initialized
    assert np.array_equal(after.w, uniform(next(sequence(42)), 4, 32))
    assert after(jnp.ones((2, 4))).shape == (2, 32)


def test_next_key_outside_of_an_initializing_block():
    with pytest.raises(RuntimeError, match="a key was asked for outside of init"):
        tx.next_key()


def test_field_initializer():
    module = Field().init(42)
    assert np.array_equal(module.a, uniform(next(sequence(42)), 1))
    assert repr(module).startswith("Field(a=array([0.")


def test_rng_init():
    module = RngInit().init(42)
    keys = sequence(42)
    assert np.array_equal(module.a, uniform(next(keys), 1))
    normal = jax.random.normal(next(keys), (1,))
    np.testing.assert_allclose(module.b, 10.0 * module.a + normal, rtol=1e-6)
    assert repr(module).startswith("RngInit(a=array([")


def test_initialization_order():
    order = []

    class All(tx.Module):
        a: Union[tx.Initializer, jnp.ndarray] = tx.Parameter.node()  # noqa: UP007
        b: Optional[jnp.ndarray] = tx.Parameter.node()  # noqa: UP045
        c: Optional[jnp.ndarray] = tx.Parameter.node()  # noqa: UP045

        def __init__(self):
            self.a = tx.Initializer(self.draw)
            self.b = None
            self.c = None

        @staticmethod
        def draw(key):
            order.append("Initializer")
            return jax.random.uniform(key, (32,))

        def rng_init(self):
            order.append("rng_init")
            self.b = self.a + jax.random.uniform(tx.next_key(), (32,))

        def __call__(self, x):
            if self.initializing():
                order.append("__call__")
                self.c = self.b + jax.random.uniform(tx.next_key(), (x.shape[-1],))
            return x + self.c

    module = All().init(42, jnp.ones(32))
    assert order[:3] == ["Initializer", "rng_init", "__call__"]
    keys = sequence(42)
    a = uniform(next(keys), 32)
    b = a + uniform(next(keys), 32)
    c = b + uniform(next(keys), 32)
    for mine, expected in ((module.a, a), (module.b, b), (module.c, c)):
        assert np.array_equal(mine, expected)
