"""The room of graphs: jaxprs are read, folded, run, copied out and written down."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from shardinit.core.ir import jaxpr as jx
from shardinit.core.ir.builder import Builder
from shardinit.core.ir.encoder import Encoder
from shardinit.core.ir.graph import Value, extract, interpret, topological
from shardinit.core.prng import derivation as keys

from .graphs import graph_of

X = np.arange(12, dtype=np.float32).reshape(3, 4)


def names(graph):
    return [node.name for node in topological(graph.outs)]


def test_a_graph_runs_as_the_function():
    @jax.jit
    def inner(x):
        return jnp.square(x).T

    graph = graph_of(lambda x: inner(x) @ x + 1, (X.shape, X.dtype))
    assert "jit" not in names(graph)
    (got,) = interpret(graph.outs, {graph.inputs[0]: X})
    assert np.array_equal(got, np.square(X).T @ X + 1)


def test_extract_makes_inputs_of_its_boundary():
    graph = graph_of(lambda x: jnp.exp(x * 2) + 1, (X.shape, X.dtype))
    exp = next(n for n in topological(graph.outs) if n.name == "exp")
    part = extract(graph.outs, exp.outputs)
    assert names(part) == ["add"]
    (got,) = interpret(part.outs, {part.inputs[0]: X})
    assert np.array_equal(got, X + 1)


def test_keys_and_integers_leave_the_graph():
    def fn(key):
        parts = jax.random.split(key, 3)
        return jax.random.key_data(jax.random.fold_in(parts[1], 2 * 3 + 1))

    root = jax.eval_shape(jax.random.key, 0)
    value = Value(root.shape, root.dtype, key=keys.root("threefry2x32"))
    closed = jx.closed_from(fn, root)
    (out,) = Builder(folds_keys=True, keeps_calls=True).read(
        *jx.opened(closed), [value]
    )
    assert out.node is None
    words = np.asarray(jax.random.key_data(jax.random.key(5)))
    (got,) = keys.derive([out.key], words)
    assert np.array_equal(got, fn(jax.random.key(5)))


def test_a_chain_of_any_length_is_walked_without_pythons_stack():
    def fn(x):
        for _ in range(5000):
            x = lax.neg(x)
        return x

    graph = graph_of(fn, ((4,), np.float32))
    assert len(names(extract(graph.outs, graph.inputs))) == 5000


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (lambda x: x * 2, lambda y: y * 2, True),
        (lambda x: x * 2, lambda x: x * 3, False),
        (lambda x: x * 0.0, lambda x: x * -0.0, False),
        (lambda x: x * jnp.nan, lambda x: x * jnp.nan, True),
        (lambda x: x.sum(0), lambda x: x.sum(1), False),
        (lambda x: x + X, lambda x: x + X.copy(), True),
    ],
)
def test_equal_functions_have_equal_bytes(one, other, same):
    def digest(fn):
        encoder = Encoder()
        encoder.put(jx.closed_from(fn, jax.ShapeDtypeStruct((3, 4), np.float32)))
        return encoder.digest()

    assert (digest(one) == digest(other)) == same


def test_what_cannot_be_written_down_counts_by_identity():
    def digest(value):
        encoder = Encoder()
        encoder.put(value)
        return encoder.digest()

    one, other = (lambda: 0), (lambda: 0)
    assert digest(one) == digest(one) != digest(other)
