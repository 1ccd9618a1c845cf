"""Folds: an axis inside the leaf's program becomes its largest element, or its place.

``categorical`` draws by the place of the largest, and 8-bit numbers are scaled by the
largest of a row. Both are found in a loop over the axis, which holds one candidate for
each element of the result and never the axis itself.
"""

from __future__ import annotations

import math

import numpy as np
from jax import lax

from shardinit.core.ir.graph import Node, Value
from shardinit.core.types import Coords, Dim, Values
from shardinit.core.window.coordinates import select, spread, spread_to, u32, unravel
from shardinit.core.window.grids import LANES
from shardinit.core.window.reasons import require
from shardinit.core.window.rules.rule import Later, Steps, rule

# Sums of floats are none of these: their last places depend on the order in which XLA
# adds, which is another one for another shape.
_EXACT = {
    "reduce_and": lax.bitwise_and,
    "reduce_max": lax.max,
    "reduce_min": lax.min,
    "reduce_or": lax.bitwise_or,
}


@rule(*_EXACT, folds=True)
def _reduce(node: Node, which: int, coords: Coords) -> Steps:
    (source,), (out,) = node.inputs, node.outputs
    require(np.dtype(out.dtype).kind in "iub" or _has_no_sign(source))
    axes = node.params["axes"]
    sizes = [source.shape[axis] for axis in axes]
    # A loop runs over whole vectors of lanes: for a few results it would be slower than
    # all of the leaf at once.
    require(0 < math.prod(sizes) < 1 << 31 and out.size >= LANES)
    values = yield Later(0, reads_axis=True)

    def at(step: Dim) -> Values:
        along = dict(zip(axes, unravel(u32(step), sizes), strict=True))
        left = iter(coords)
        places = tuple(
            along[axis] if axis in along else next(left) for axis in range(source.ndim)
        )
        return spread([values(places), *coords])[0]

    def step(number: Values, best: Values) -> Values:
        return _EXACT[node.name](best, spread_to(at(number), np.shape(best)))

    return lax.fori_loop(1, math.prod(sizes), step, at(0))


def _has_no_sign(value: Value) -> bool:
    """Whether floats are sure to be no negative zero.

    XLA's loops keep the first or the last of two zeros as they are vectorised or not.
    They drop NaNs as well: of ``max(where(x > 3, nan, x), 0)`` plain jit makes numbers,
    a loop of maxima NaNs (CPU, 0.10.2 and 0.12.0.1). None is drawn.
    """
    node = value.node
    if node is not None and node.name == "fence":
        node = node.inputs[0].node
    return node is not None and node.name in ("abs", "exp", "square")


@rule("argmax", "argmin")
def _place_of_best(node: Node, which: int, coords: Coords) -> Steps:
    (axis,) = node.params["axes"]
    require(0 < node.inputs[0].shape[axis] < 1 << 31)
    values = yield Later(0, reads_axis=True)
    dtype = node.params["index_dtype"]
    beats = lax.gt if node.name == "argmax" else lax.lt

    def at(step: Dim) -> Values:
        value = values((*coords[:axis], u32(step), *coords[axis:]))
        return spread([value, *coords])[0]

    def step(number: Values, best: tuple[Values, Values]) -> tuple[Values, Values]:
        value, place = best
        other = spread_to(at(number), np.shape(value))
        # The first of equals wins, and the first NaN wins over all.
        wins = beats(other, value)
        if np.dtype(value.dtype).kind not in "iub":
            nan = lax.bitwise_and(lax.ne(other, other), lax.eq(value, value))
            wins = lax.bitwise_or(wins, nan)
        here = lax.convert_element_type(number, dtype)
        return select(wins, other, value), select(wins, here, place)

    first = at(0)
    nowhere = lax.full(np.shape(first), 0, dtype)
    return lax.fori_loop(1, node.inputs[0].shape[axis], step, (first, nowhere))[1]
