"""Folds: the place of the largest element along an axis inside the leaf's program.

``categorical`` draws so. The largest is found in a loop over the axis, which holds one
candidate for each element and never the axis itself.
"""

from __future__ import annotations

import numpy as np
from jax import lax

from shardinit.core.ir.graph import Node
from shardinit.core.types import Coords, Dim, Values
from shardinit.core.window.coordinates import select, spread, spread_to, u32
from shardinit.core.window.reasons import require
from shardinit.core.window.rules.rule import Later, Steps, rule


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
