"""What init computes of its inputs and states: JAX's values, of one run of the code."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import shardinit
from shardinit import module as tx


class Seen(tx.Module):
    """A parameter that is a function of the first input."""

    value: object = tx.Parameter.node(None)

    def __init__(self, fn):
        self.fn = fn

    def __call__(self, x):
        if self.initializing():
            self.value = self.fn(x)
        return x


class Counting(tx.Module):
    """A state that takes a step in every call."""

    count: object = tx.State.node(None)

    def __init__(self, start, step):
        self.count, self.step = start, step

    def __call__(self, x):
        self.count = self.step(self.count)
        return x


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "int8"])
@pytest.mark.parametrize(
    "fn",
    [
        lambda x: x.mean(0),
        lambda x: x.mean(),
        lambda x: x.var(0),
        lambda x: x[0] * 1.5,
        lambda x: 2 + x[0],
    ],
    ids=["mean", "mean of all", "var", "times a float", "plus an int"],
)
@pytest.mark.few(8)
def test_a_function_of_the_input_is_jaxs(fn, dtype):
    x = (jax.random.normal(jax.random.key(3), (512, 64)) * 3 + 5).astype(dtype)
    want = jax.jit(fn)(x)
    for made in (
        Seen(fn).init(0, x),
        Seen(fn).init(0, np.asarray(x)),
        shardinit.init(tx.init_fn(Seen(fn), x), 0),
        jax.jit(lambda x: Seen(fn).init(0, x))(x),
    ):
        assert made.value.dtype == want.dtype
        np.testing.assert_allclose(
            np.asarray(made.value, np.float64), np.asarray(want, np.float64), rtol=2e-2
        )


def plus_one(state):
    state += 1
    return state


@pytest.mark.parametrize(
    "start",
    [
        lambda: jnp.int32(0),
        lambda: jnp.zeros(64, jnp.bfloat16),
        lambda: jnp.zeros((2, 64), jnp.int32),
        lambda: np.zeros(3, np.float32),
        lambda: np.int32(0),
        lambda: np.float32(0),
        lambda: 0,
    ],
    ids=["scalar", "bfloat16", "int32", "numpy", "np.int32", "np.float32", "int"],
)
def test_a_state_is_counted_in_init_as_under_jit(start, mesh):
    for where in ({}, {"mesh": mesh}):
        waits = Counting(start(), plus_one)
        made = waits.init(0, jnp.ones(2), **where)
        want = jax.jit(plus_one)(start())
        assert jnp.result_type(made.count) == want.dtype
        np.testing.assert_array_equal(made.count, want)
        np.testing.assert_array_equal(waits.count, start())
        assert made(jnp.ones(2)) is not None
        np.testing.assert_array_equal(made.count, plus_one(want))


def test_states_have_jaxs_methods_in_init():
    state = jnp.arange(64, dtype=jnp.float32)
    for step in (lambda s: s.at[0].add(1), lambda s: 0.9 * s + 0.1, lambda s: s.mean()):
        made = Counting(state, step).init(0, jnp.ones(2))
        np.testing.assert_allclose(made.count, jax.jit(step)(state), rtol=1e-6)


def test_the_code_of_a_module_runs_once_in_an_init():
    numbers = itertools.count(2)

    class Drawn(tx.Module):
        value: jax.Array | None = tx.Parameter.node(None)
        setting: int = 0

        def rng_init(self):
            self.setting = next(numbers)

        def __call__(self, x):
            if self.initializing():
                self.value = jnp.full(4, float(self.setting))
            return x

    for key in (0, jax.random.key(0, impl="rbg"), jax.random.PRNGKey(0)):
        before = next(numbers)
        made = Drawn().init(key, jnp.ones(2))
        assert made.setting == float(made.value[0]) == before + 1
        assert next(numbers) == before + 2
    made = shardinit.init(tx.init_fn(Drawn(), jnp.ones(2)), 7)
    assert made.setting == made.value[0]
    rbg = jax.random.key(0, impl="rbg")
    made = shardinit.init(tx.init_fn(Drawn(), jnp.ones(2)), rbg)
    assert made.setting == made.value[0]
