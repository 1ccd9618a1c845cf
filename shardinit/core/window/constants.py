"""Constants: leaves that no key reaches, such as a table of frequencies.

A table of numbers is made once, as plain ``jax.jit`` makes it on one device, and every
device gets its part. The compiler may compute a table while it compiles, or unroll it,
with other last places than the loop that computes a part of it, so a window that is
computed alone would depend on where the table is cut. Large tables, and those that take
no arithmetic on floats, are windowed like any other leaf.
"""

from __future__ import annotations

import jax
import numpy as np
from jax import lax

from shardinit.core.ir.graph import Node, Subgraph, interpret, topological
from shardinit.core.types import DType, Values
from shardinit.core.window.rules.rule import EXACT, MOVES

MAX_BYTES = 1 << 20

# They do no arithmetic either, but what is made by them alone has always been kept as a
# table: with a window of its own it would be one program more to compile, and where a
# nested call is kept the fingerprints of such functions would change.
_KEPT = frozenset(("dynamic_slice", "split", "stack", "tile", "unstack"))


def is_table(graph: Subgraph) -> bool:
    """Whether a leaf program makes a small table of numbers."""
    if graph.inputs or len(graph.outs) != 1:
        return False
    (out,) = graph.outs
    if not _is_number(out.dtype) or out.size * out.dtype.itemsize > MAX_BYTES:
        return False
    order = topological([out])
    return any(map(_varies, order)) and any(map(_rounds, order))


def _varies(node: Node) -> bool:
    """Whether an equation is, or reads, what has several elements of its own."""
    return node.name == "iota" or any(
        v.const is not None and v.ndim for v in node.inputs
    )


def _rounds(node: Node) -> bool:
    """Whether an equation does arithmetic on floats."""
    exact = node.name in EXACT and node.name not in _KEPT
    return not exact and any(_is_number(v.dtype) for v in node.outputs)


def is_uniform(graph: Subgraph) -> bool:
    """Whether all elements of what a leaf program makes are one number."""
    order = topological(graph.outs)
    read = [*graph.outs, *(v for node in order for v in node.inputs)]
    return all(map(_makes_each_alike, order)) and all(
        v.size == 1 and not jax.numpy.issubdtype(v.dtype, jax.dtypes.extended)
        for v in read
        if v.const is not None or v in graph.inputs
    )


def _makes_each_alike(node: Node) -> bool:
    """Whether what it makes of one number everywhere is one number, in every loop."""
    moves = node.name in MOVES and len(node.inputs) == 1
    return moves or node.name in ("convert_element_type", "mul", "neg")


def evaluate_table(graph: Subgraph) -> list[Values]:
    """Runs the program of a table as the jaxpr would have run."""
    constants = {
        value
        for node in topological(graph.outs)
        for value in node.inputs
        if value.const is not None
    }
    counted = {value: _counted(value.const) for value in constants if value.counted}
    return interpret(graph.outs, {v: x for v, x in counted.items() if x is not None})


def _counted(const: Values) -> Values | None:
    """Integers that count up or down along axes, counted again; None for others.

    They were folded while the jaxpr was read, for the keys that might derive from
    them. Left as data they would have the compiler fold all that is made of them.
    """
    const = np.asarray(const)
    if const.ndim == 0 or const.size == 0 or const.dtype.kind not in "iu":
        return None
    first, steps = const.ravel()[0], _steps(const)
    places = np.indices(const.shape, sparse=True)
    expected = int(first) + sum(n * at for n, at in zip(steps, places, strict=True))
    if not np.array_equal(np.broadcast_to(expected, const.shape), const):
        return None
    made = lax.full(const.shape, first, const.dtype)
    for axis, step in enumerate(steps):
        if step:
            line = lax.broadcasted_iota(const.dtype, const.shape, axis)
            made = made + line * np.asarray(step).astype(const.dtype)
    return made


def _steps(const: np.ndarray) -> list[int]:
    """From the first to the second element along each axis; 0 where there is one."""
    corner = (0,) * (const.ndim - 1)
    lines = [np.moveaxis(const, axis, -1)[corner] for axis in range(const.ndim)]
    return [int(x[1]) - int(x[0]) if x.size > 1 else 0 for x in lines]


def _is_number(dtype: DType) -> bool:
    return jax.numpy.issubdtype(dtype, np.inexact)
