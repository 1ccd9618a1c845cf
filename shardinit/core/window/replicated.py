"""Replicated leaves: computed in full on every device, as by plain JAX, then cropped.

What no rule windows (QR, sorting, gamma, sums along the leaf) costs the memory of the
full leaf on each device, and has the same bits on all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax import lax

from shardinit.core.ir.graph import Subgraph, interpret
from shardinit.core.types import Dim, Values
from shardinit.core.window import coordinates as crd


def evaluate_replicated(
    graph: Subgraph,
    operands: Sequence[Values],
    starts: Sequence[Sequence[Dim]],
    shapes: Sequence[Sequence[int]],
) -> list[Values]:
    """Windows of all results of a replicated program, cropped from plain JAX's."""
    known = dict(zip(graph.inputs, operands, strict=True))
    return crop(lambda: interpret(graph.outs, known), starts, shapes)


def crop(
    compute: Callable[[], Sequence[Values]],
    starts: Sequence[Sequence[Dim]],
    shapes: Sequence[Sequence[int]],
) -> list[Values]:
    """Windows of arrays that are computed in full, as if nothing was cropped after.

    A part would otherwise be fused with the computation, in loops that depend on the
    part, and so would its last places: XLA's CPU compiler has taken all barriers away
    by then (JAX 0.10.2 and 0.12.0.1: none is left in what ``as_text`` of an executable
    shows). The branch of a condition is compiled by itself, and the compiler cannot
    know that this one always holds: no window begins at 2^31 or beyond.

    Args:
      compute: makes the arrays, none of them keys.
      starts: of the windows; literal zeros if they are all of their arrays.
      shapes: of the windows.
    """
    first = next((start[0] for start in starts if start), 0)
    if isinstance(first, int):  # the barrier: XLA would give results its own sharding
        return list(lax.optimization_barrier(list(compute())))
    likes = jax.eval_shape(compute)
    arrays = lax.cond(
        first < np.uint32(1 << 31),
        lambda: list(compute()),
        lambda: [lax.full(like.shape, 0, like.dtype) for like in likes],
    )
    return [
        lax.dynamic_slice(array, [crd.u32(s) for s in start], shape)
        for array, start, shape in zip(arrays, starts, shapes, strict=True)
    ]
