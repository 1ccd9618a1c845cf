"""The room of windows: analysis and evaluation of a graph at its own door."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from shardinit.core.ir import jaxpr as jx
from shardinit.core.window.analysis import analyse
from shardinit.core.window.constants import is_table, is_uniform
from shardinit.core.window.evaluate import evaluate_window
from shardinit.core.window.reasons import Reason

from .graphs import graph_of

KEY = jax.eval_shape(jax.random.key, 0)


def windowed(fn, start, shape, *, lanes=True):
    """A window of what a function makes of a key."""
    graph = graph_of(fn, (KEY.shape, KEY.dtype))
    analysis = analyse(graph)
    assert analysis.replicated_reason is None

    def run(key, origin):
        places = [np.uint32(n) + origin for n in start]
        return evaluate_window(graph, analysis, [key], places, shape, lanes=lanes)

    return jax.jit(run)(jax.random.key(3), np.uint32(0))


@pytest.mark.parametrize("lanes", [True, False])
@pytest.mark.parametrize("start", [(0, 0), (3, 17), (63, 31)])
def test_a_window_has_the_bits_of_the_whole(start, lanes):
    def fn(key):
        return jax.random.uniform(key, (64, 32)).T[::-1].reshape(64, 32)

    whole = jax.jit(fn)(jax.random.key(3))
    shape = tuple(min(8, n - s) for n, s in zip((64, 32), start, strict=True))
    got = windowed(fn, start, shape, lanes=lanes)
    assert np.array_equal(got, whole[tuple(map(slice, start, np.add(start, shape)))])


def test_a_chain_of_5000_operations_evaluates():
    def fn(key):
        x = jax.random.bits(key, (256,))
        for _ in range(5000):
            x = lax.not_p.bind(x)
        return x

    graph = graph_of(fn, (KEY.shape, KEY.dtype))
    analysis = analyse(graph)
    run = lambda key: evaluate_window(  # noqa: E731
        graph, analysis, [key], [np.uint32(7)], (3,), lanes=False
    )
    assert jax.eval_shape(run, KEY).shape == (3,)


def test_each_value_is_made_once_for_a_set_of_coordinates():
    def fn(key):
        x = jax.random.uniform(key, (128,))
        for _ in range(40):  # 2**40 paths, 40 products
            x = x * x
        return x

    graph = graph_of(fn, (KEY.shape, KEY.dtype))
    analysis = analyse(graph)

    def run(key):
        return evaluate_window(
            graph, analysis, [key], [np.uint32(0)], (128,), lanes=False
        )

    closed = jx.closed_from(run, KEY)
    assert str(closed).count(" mul ") < 60


@pytest.mark.parametrize(
    ("fn", "reason", "names"),
    [
        (lambda k: jnp.sort(jax.random.normal(k, (64,))), Reason.NO_RULE, "sort"),
        (
            lambda k: jnp.linalg.qr(jax.random.normal(k, (8, 8)))[0],
            Reason.NO_RULE,
            "qr",
        ),
        (
            lambda k: jax.random.normal(k, (64, 64)).sum(),
            Reason.NO_RULE,
            "reduce_sum",
        ),
    ],
)
def test_why_a_leaf_cannot_be_windowed(fn, reason, names):
    analysis = analyse(graph_of(fn, (KEY.shape, KEY.dtype)))
    assert analysis.replicated_reason is not None
    assert analysis.replicated_reason.reason is reason
    assert names in str(analysis.replicated_reason)


def test_keys_and_small_tables_are_wanted_in_full():
    table = np.arange(40.0, dtype=np.float32)

    def fn(key):
        rows = jax.random.randint(key, (512,), 0, 40)
        return jnp.asarray(table * 2)[rows]

    graph = graph_of(fn, (KEY.shape, KEY.dtype))
    analysis = analyse(graph)
    assert analysis.inputs
    assert all(jx.is_key(v.dtype) or v.size <= table.size for v in analysis.inputs)


@pytest.mark.parametrize(
    ("fn", "table"),
    [
        (lambda x: x[::-1].reshape(2, 4), False),
        (lambda x: jnp.concatenate([x, x[::-1]]), False),
        (lambda x: jnp.where(x > 3, x, x[::-1]), False),
        (lambda x: x * 0.5, True),
        (lambda x: jnp.tile(jnp.cos(x), 2), True),
        # Kept as tables, though nothing is computed: so fingerprints have always said.
        (lambda x: jnp.tile(x, 2), True),
        (lambda x: jnp.stack([x, x[::-1]]), True),
        (lambda x: jnp.split(x, 2)[1], True),
    ],
)
def test_which_numbers_are_a_table(fn, table):
    graph = graph_of(lambda: fn(lax.iota(np.float32, 8)))
    assert is_table(graph) == table


@pytest.mark.parametrize(
    ("fn", "uniform"),
    [
        (
            lambda: jnp.tile(jnp.full((2, 3), 2.5) * 0.5, (1, 2)).astype(jnp.bfloat16),
            True,
        ),
        (lambda: jnp.pad(jnp.ones(3), 1), False),
        (lambda: jnp.concatenate([jnp.ones(3), jnp.zeros(3)]), False),
        (lambda: jnp.arange(3.0), False),
    ],
)
def test_moves_and_products_of_one_number_are_one_number(fn, uniform):
    assert is_uniform(graph_of(fn)) == uniform
