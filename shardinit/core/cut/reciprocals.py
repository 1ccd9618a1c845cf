"""Divisions by numbers that no key reaches, written as XLA runs them.

XLA multiplies by a reciprocal where it can have it for less: where the divisor is a
constant, or varies along fewer axes than what it divides. In a window the divisor is
looked up at the window's place and nothing of that is left to see, so the compiler
would divide, with other last places: ``x / table``, and ``x.at[rows].divide(3)``, which
JAX makes a division by ones with threes among them
(https://github.com/jax-ml/jax/issues/19162).
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import lax

from shardinit.core.ir.graph import Node, Subgraph, Value, extract, topological
from shardinit.core.window.analysis import constants_among
from shardinit.core.window.rules.elementwise import elementwise
from shardinit.core.window.rules.rule import MOVES, RULES

Axes = frozenset[int]


def multiply_by_reciprocals(graph: Subgraph) -> Subgraph:
    """Turns ``x / c`` into ``x * (1 / c)`` where XLA does."""
    order = topological(graph.outs)
    constants = constants_among(order)
    axes: dict[Value, Axes] = {}
    for node in order:
        if constants.issuperset(node.outputs):
            axes.update((v, _axes(node, v, axes)) for v in node.outputs)
    chosen = {
        node
        for node in order
        if node.name == "div"
        and _has_reciprocal(node.outputs[0])
        and _is_known(node.inputs[1], constants)
        and not _is_known(node.inputs[0], constants)
        and _is_cheaper(node, axes)
    }
    if not chosen:
        return graph

    def expand(node: Node, inputs: list[Value]) -> list[Value] | None:
        if node not in chosen:
            return None
        value, divisor = inputs
        one = Value((), divisor.dtype, const=np.ones((), divisor.dtype))
        inverse = Node("div", lax.div_p, {}, [one, divisor], [divisor]).outputs
        return list(Node("mul", lax.mul_p, {}, [value, *inverse], node.outputs).outputs)

    return extract(graph.outs, graph.inputs, expand)


def _has_reciprocal(value: Value) -> bool:
    # bfloat16 is divided in float32 and rounded.
    return jnp.issubdtype(value.dtype, jnp.floating) and value.dtype != jnp.bfloat16


def _is_known(value: Value, constants: set[Value]) -> bool:
    return value.const is not None or value in constants


def _is_cheaper(node: Node, axes: dict[Value, Axes]) -> bool:
    """Whether XLA has the reciprocal for less than the division."""
    divided, divisor = node.inputs
    if _of(divisor, axes) < _long(divided.shape):
        return True
    made = topological([divisor])
    read = [divisor, *(v for other in made for v in other.inputs)]
    return not any(v.counted for v in read) and all(map(_is_folded, made))


def _is_folded(node: Node) -> bool:
    """Whether XLA computes it while compiling; an iota it leaves, and long sums."""
    return (
        node.name in MOVES
        or node.name.startswith("scatter")
        or RULES.get(node.name) is elementwise
    )


def _long(shape: tuple[int, ...]) -> Axes:
    return frozenset(axis for axis, size in enumerate(shape) if size > 1)


def _of(value: Value, axes: dict[Value, Axes]) -> Axes:
    """The axes along which a value that no key reaches varies."""
    if value.const is None:
        return axes[value]
    array = np.asarray(value.const)
    return frozenset(
        axis
        for axis in _long(array.shape)
        if (array != array.take([0], axis=axis)).any()
    )


def _axes(node: Node, out: Value, axes: dict[Value, Axes]) -> Axes:
    """The axes along which a result varies, by what it is made of."""
    if node.name == "iota":
        return frozenset([node.params["dimension"]])
    if node.name == "broadcast_in_dim":
        places = node.params["broadcast_dimensions"]
        return frozenset(int(places[axis]) for axis in _of(node.inputs[0], axes))
    if RULES.get(node.name) is elementwise:
        return frozenset().union(*(_of(v, axes) for v in node.inputs))
    return _long(out.shape)
