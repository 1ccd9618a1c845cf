"""A map whose steps no rule covers: windowed by the step, each step made whole.

``lax.map`` and the scans of stacked layers make one block of the leaf a step. Where the
step itself can be windowed it is, and no map is left. Where it cannot (a QR a layer, a
block of an orthogonal matrix) a window still needs only those steps that it touches:
they run in a loop, one after the other, and what the window wants of each is kept. So
nothing larger than one block exists beside the window, and an initializer that is
written as a map over blocks never holds its whole leaf anywhere.

A step is the same code on every device and for every window, behind a barrier, and what
follows only moves its elements: the bits do not depend on the window.
"""

from __future__ import annotations

import math

import jax
import numpy as np
from jax import lax

from shardinit.core.ir import jaxpr as jx
from shardinit.core.ir.graph import Node
from shardinit.core.types import Coords, Values, Words
from shardinit.core.window.coordinates import (
    add,
    equal,
    is_one,
    least,
    select,
    spread,
    u32,
)
from shardinit.core.window.rules.bits import take
from shardinit.core.window.rules.rule import Full, Steps, rule


@rule("map")
def _map(node: Node, which: int, coords: Coords) -> Steps:
    """Runs the steps that ``coords`` touch and keeps the elements there."""
    args = []
    for number in range(len(node.inputs)):
        args.append((yield Full(number, of_keys=True)))
    out = node.outputs[which]
    # Clipped, since the lanes that pad a window lie beyond its end.
    steps = least(coords[0], u32(node.params["length"] - 1))
    inner = coords[1:]
    window = np.shape(spread([steps, *inner])[0])

    def one(step: Words, held: Values) -> Values:
        taken = [
            jax.numpy.asarray(a)[step] if mapped else a
            for a, mapped in zip(args, node.params["mapped"], strict=True)
        ]
        (block,) = jx.run(node.params["jaxpr"], (), taken)
        block = lax.optimization_barrier(block)
        wanted = spread_pick(block, inner, len(window))
        return select(equal(steps, step), wanted, held)

    # Of a window without elements the first step lies behind the last.
    flat = lax.reshape(steps, (math.prod(np.shape(steps)),))
    first, last = lax.reduce_min(flat, (0,)), lax.reduce_max(flat, (0,))
    empty = lax.full(window, 0, out.dtype)
    return lax.fori_loop(first, add(last, u32(1)), one, empty)


def spread_pick(block: Values, coords: Coords, rank: int) -> Values:
    """The elements of a block at ``coords``, along the axes of a grid of ``rank``.

    Coordinates that each vary along one axis of the grid are taken axis by axis, last
    axis first: the block stays small until the window's rows are taken, and no index
    is as large as the window.
    """
    axes = [[i for i, n in enumerate(np.shape(c)) if not is_one(n)] for c in coords]
    targets = [axis for varying in axes for axis in varying]
    if len(set(targets)) < len(targets) or any(len(varying) > 1 for varying in axes):
        return take(block.reshape(-1), block.shape, coords)
    for axis in reversed(range(block.ndim)):
        index = jax.numpy.asarray(coords[axis]).reshape(-1)
        block = jax.numpy.take(block, index, axis=axis, mode="clip")
    block = lax.squeeze(block, [i for i, varying in enumerate(axes) if not varying])
    block = lax.transpose(block, sorted(range(block.ndim), key=targets.__getitem__))
    return lax.expand_dims(block, sorted(set(range(rank)).difference(targets)))
