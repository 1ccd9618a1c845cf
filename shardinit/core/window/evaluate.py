"""Windowed evaluation: any window of a leaf, computed alone.

A window is evaluated on a grid (``grids``) behind a barrier. Full lanes are joined with
one tail of 128 lanes, which costs no memory. What derives keys, and small tables, are
made in full first (they are a few words); what no rule covers (QR, sorting, gamma, sums
along the leaf) makes the program a replicated one (``replicated``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jax import lax

from shardinit.core.ir import jaxpr as jx
from shardinit.core.ir.graph import Subgraph, Value, interpret
from shardinit.core.types import Dim, Values, Words
from shardinit.core.window import coordinates as crd
from shardinit.core.window.analysis import Analysis
from shardinit.core.window.evaluator import Evaluator, Part
from shardinit.core.window.grids import LANES, axes_grid, lanes_grid

MIN_ROW_LANES = 512


def evaluate_window(
    graph: Subgraph,
    analysis: Analysis,
    operands: Sequence[Values],
    start: Sequence[Words],
    shape: Sequence[Dim],
    *,
    lanes: bool,
) -> Values:
    """One window of a windowed program's leaf.

    Args:
      graph: the leaf program.
      analysis: of that program; it has no ``replicated_reason``.
      operands: the program's operands, keys as typed keys.
      start: uint32 scalars, where the window begins along each axis.
      shape: the window's shape; sizes may be symbolic dimensions.
      lanes: evaluate over flat lanes (CPU) instead of the window's own axes.

    Returns:
      The window, with the leaf's dtype.
    """
    (out,) = graph.outs
    if any(isinstance(n, int) and n == 0 for n in shape):
        return lax.full(shape, 0, out.dtype)
    parts: dict[Value, Part] = {}
    known = _in_full(graph, analysis, operands)
    evaluator = Evaluator(known, _unknown_zero(start), parts)

    def window(value: Value, start: Sequence[Words], shape: Sequence[Dim]) -> Values:
        if not lanes:
            return crd.spread_to(evaluator.at(value, axes_grid(start, shape)), shape)
        rows = _rows(analysis, shape) if value is out else 0
        return _by_lanes(evaluator, value, start, shape, rows)

    for value, axes in analysis.parts:
        begin = [crd.ZERO if axis is None else start[axis] for axis in axes]
        size = [1 if axis is None else shape[axis] for axis in axes]
        parts[value] = Part(window(value, begin, size), begin)
    return window(out, start, shape)


def _by_lanes(
    evaluator: Evaluator,
    value: Value,
    start: Sequence[Words],
    shape: Sequence[Dim],
    rows: int,
) -> Values:
    """A window of a value over flat lanes; ``rows`` leading axes stand apart."""
    count = math.prod(shape[rows:])
    height = (math.prod(shape[:rows]),) if rows else ()

    def at(first: Dim, lanes_count: Dim) -> Values:
        grid = lanes_grid(start, shape, value.shape, rows, first, lanes_count)
        return crd.spread_to(evaluator.at(value, grid), (*height, lanes_count))

    # Padding all of the window to whole vectors and cutting it afterwards would copy
    # it: temporaries as large as the shard (JAX 0.12.0.1, CPU).
    full = count // LANES * LANES
    static = isinstance(count, int)
    if static and full == count:
        flat = at(0, count)
    else:
        # The tail is always a whole vector of lanes, cut after the barrier, so that
        # the compiler sees the same code for the last elements as for all others.
        tail = lax.optimization_barrier(at(full, LANES))
        flat = lax.slice_in_dim(tail, 0, count - full, axis=len(height))
        if not (static and full == 0):
            flat = lax.concatenate([at(0, full), flat], len(height))
    return lax.reshape(lax.optimization_barrier(flat), tuple(shape))


def _unknown_zero(start: Sequence[Words]) -> Words:
    """A zero made of where the window starts, which is known only as it runs.

    No window begins at the last of 2**32 elements of a first axis: ``analysis`` takes
    care of it.
    """
    if not start:
        return crd.ZERO
    last = lax.eq(crd.u32(start[0]), np.uint32(0xFFFFFFFF))
    return lax.convert_element_type(last, np.uint32)


def _in_full(
    graph: Subgraph, analysis: Analysis, operands: Sequence[Values]
) -> dict[Value, Values]:
    """The operands, and the tables and keys that windows read here and there."""
    known = dict(zip(graph.inputs, operands, strict=True))
    made = interpret(analysis.inputs, known)
    return {
        # Computed tables look the same to the compiler in every window.
        v: array
        if v in known or jx.is_key(v.dtype)
        else lax.optimization_barrier(array)
        for v, array in zip(analysis.inputs, made, strict=True)
    }


def _rows(analysis: Analysis, shape: Sequence[Dim]) -> int:
    """How many leading axes stand apart from the lanes.

    Those that choose the key do, and more where what is left still fills whole
    vectors: then no lane has to be divided into coordinates. Not so beside numbers
    that depend on some axes only (a row that the leaf is multiplied by): they would be
    narrower than the grid, and XLA moves scalar factors to what is narrow.
    """
    least = analysis.key_axes
    if not analysis.even or not all(isinstance(n, int) for n in shape):
        return least
    for rows in range(len(shape) - 1, least, -1):
        count = math.prod(shape[rows:])
        if count % LANES == 0 and count >= MIN_ROW_LANES:
            return rows
    return least
