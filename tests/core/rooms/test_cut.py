"""The room of the cut: which sources and programs a function is taken apart into."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shardinit.core.cut import factors
from shardinit.core.cut.cutter import cut
from shardinit.core.cut.leaf_program import Kind
from shardinit.core.cut.reciprocals import multiply_by_reciprocals
from shardinit.core.cut.sources import Constant, Keys, Replicated, Table, Windowed
from shardinit.core.ir.graph import topological

from .graphs import graph_of

KEY = jax.eval_shape(jax.random.key, 0)
TABLE = np.arange(1, 65, dtype=np.float32)


def test_every_leaf_has_one_source():
    def fn(key):
        return {
            "constant": np.arange(3),
            "keys": jax.random.split(key, 2),
            "replicated": jnp.sort(jax.random.normal(key, (64,))),
            "table": jnp.sin(jnp.arange(64.0)),
            "windowed": jax.random.normal(key, (64, 64)),
        }

    made = cut(fn, KEY)
    kinds = [type(leaf.source) for leaf in made.leaves]
    assert kinds == [Constant, Keys, Replicated, Table, Windowed]
    assert {p.kind for p in made.programs} == {Kind.REPLICATED, Kind.WINDOWED}


def test_what_differs_in_key_and_scale_is_one_program():
    def fn(key):
        return [
            jax.random.normal(k, (8, 32)) * n
            for n, k in enumerate(jax.random.split(key, 9), 1)
        ]

    made = cut(fn, KEY)
    assert len(made.programs) == 1
    assert len({leaf.operands for leaf in made.leaves}) == 9


def test_the_fingerprint_tells_functions_apart_and_not_traces():
    def fn(scale):
        return lambda key: jax.random.normal(key, (8, 32)) * scale

    assert cut(fn(2.0), KEY).fingerprint == cut(fn(2.0), KEY).fingerprint
    assert cut(fn(2.0), KEY).fingerprint != cut(fn(3.0), KEY).fingerprint


@pytest.mark.parametrize(
    ("fn", "multiplies"),
    [
        (lambda x: x / TABLE, True),
        (lambda x: x / (jnp.arange(64.0) + 1), True),
        (lambda x: x.at[3:9].divide(3), True),
        (lambda x: x / (jnp.eye(64) + 1), False),
        (lambda x: x / (x + 1), False),
        (lambda x: TABLE / x, False),
        (lambda x: x / jnp.abs(x).max(0), True),
        (lambda x: x / jnp.abs(x).max(), False),
        (lambda x: x / 3, True),
    ],
)
def test_where_xla_multiplies_by_a_reciprocal(fn, multiplies):
    graph = graph_of(fn, ((64, 64), np.float32))
    changed = multiply_by_reciprocals(graph)
    assert (changed is not graph) == multiplies
    by = {n.inputs[0].node for n in topological(changed.outs) if n.name == "div"}
    assert not multiplies or by == {None}  # one over what is narrower, or known


@pytest.mark.parametrize(
    ("fn", "moves"),
    [
        (lambda x: x * 0.3 * TABLE, True),
        (lambda x: x * 0.3 * 0.7 * TABLE, False),
        (lambda x: x * 0.3 * np.broadcast_to(TABLE, (64, 64)), False),
        (lambda x: x * 0.3 * 0.7 * jnp.abs(x).max(0), True),
        (lambda x: (x * 0.3).T * TABLE, False),
        (lambda x: x * TABLE * 0.3, False),
        (lambda x: (x * 0.3) * (x[0] > 3).astype(x.dtype), False),
        (lambda x: (x * 0.3) * jnp.abs(x).max(), False),
        (lambda x: (x * 0.3) * x, False),
    ],
)
def test_where_older_xla_moves_a_factor_to_a_row(fn, moves, monkeypatch):
    graph = graph_of(fn, ((64, 64), np.float32))
    monkeypatch.setattr(factors, "_MOVES_FACTORS", True)
    changed = factors.move_factors(graph)
    assert (changed is not graph) == moves
    if moves:
        (root,) = changed.outs
        assert root.node.inputs[0] is changed.inputs[0]  # x, without a factor
    monkeypatch.setattr(factors, "_MOVES_FACTORS", False)
    assert factors.move_factors(graph) is graph
