"""Scatters: windows set, or combined, at places known while tracing.

``x.at[0].set(0)`` changes a few windows of an array. Each is a comparison for every
element, so there may be no more than a few, and they must not overlap.
"""

from __future__ import annotations

import itertools

import numpy as np
from jax import lax

from shardinit.core.ir import jaxpr as jx
from shardinit.core.ir.graph import Node
from shardinit.core.types import Coords, Values, Words
from shardinit.core.window.coordinates import (
    ZERO,
    least,
    less,
    select,
    spread,
    sub,
    u32,
)
from shardinit.core.window.reasons import require
from shardinit.core.window.rules.gathers import fits, is_mode
from shardinit.core.window.rules.rule import At, Later, Steps, rule

MAX_UPDATES = 64  # scattered windows that are worth a comparison each

_COMBINE = {
    "scatter": lambda old, new: new,
    "scatter-add": lax.add,
    "scatter-mul": lax.mul,
    "scatter-min": lax.min,
    "scatter-max": lax.max,
}


@rule(*_COMBINE)
def _scatter(node: Node, which: int, coords: Coords) -> Steps:
    windows = _separate_windows(node)
    out = yield At(0, coords)
    updates = yield Later(2)
    dims = node.params["dimension_numbers"]
    combine = _COMBINE[node.name]
    free = [a for a in range(len(coords)) if a not in dims.inserted_window_dims]
    rank = node.inputs[2].ndim
    batch = [a for a in range(rank) if a not in dims.update_window_dims]
    for place, spans in windows:
        at: list[Words] = [ZERO] * rank
        for axis, number in zip(batch, place, strict=True):
            at[axis] = u32(number)
        inside: Values | None = None
        for axis, (start, size) in spans.items():
            within = less(sub(coords[axis], u32(start)), u32(size))
            inside = within if inside is None else _both(inside, within)
        for axis, window in zip(free, dims.update_window_dims, strict=True):
            start, size = spans.get(axis, (0, 0))
            here = coords[axis]
            if size:
                # Outside it wraps to a large number: clamped, and not chosen.
                here = least(sub(here, u32(start)), u32(size - 1))
            at[window] = here
        new = combine(*spread([out, updates(tuple(at))]))
        out = new if inside is None else select(inside, new, out)
    return out


def _only_combines(node: Node) -> bool:
    """Whether it is the primitive's own arithmetic; ``x.at[i].apply(f)`` brings f."""
    body = node.params["update_jaxpr"]
    if body is None or node.name != "scatter":
        return True
    return jx.returns_operand(body, 1)


def _both(one: Values | None, other: Values) -> Values:
    return lax.bitwise_and(*spread([one, other]))


def _separate_windows(
    node: Node,
) -> list[tuple[tuple[int, ...], dict[int, tuple[int, int]]]]:
    """The scattered windows (see ``_windows``) if they are few and do not overlap."""
    indices = node.inputs[1]
    require(_only_combines(node))
    require(len(node.inputs) == 3 and indices.const is not None)
    require(not node.params["dimension_numbers"].operand_batching_dims)
    require(indices.size <= MAX_UPDATES * max(indices.shape[-1], 1))
    windows = _windows(node)
    for (_, one), (_, other) in itertools.combinations(windows, 2):
        spans = [(*one[axis], other[axis][0]) for axis in one]
        require(not all(abs(a - b) < size for a, size, b in spans))
    return windows


def _windows(node: Node) -> list[tuple[tuple[int, ...], dict[int, tuple[int, int]]]]:
    """Each scattered window: its place among the indices, and axis to (start, size).

    Windows that would be dropped are left out.
    """
    dims = node.params["dimension_numbers"]
    operand, indices, updates = node.inputs
    starts = np.asarray(indices.const).astype(np.int64)
    free = [a for a in range(operand.ndim) if a not in dims.inserted_window_dims]
    sizes = dict.fromkeys(range(operand.ndim), 1)
    sizes.update(
        {
            a: updates.shape[u]
            for a, u in zip(free, dims.update_window_dims, strict=True)
        }
    )
    indexed = dims.scatter_dims_to_operand_dims
    room = np.asarray([operand.shape[a] - sizes[a] for a in indexed], np.int64)
    found = []
    for place in itertools.product(*map(range, starts.shape[:-1])):
        start = starts[place]
        if is_mode(node, "CLIP"):
            start = np.clip(start, 0, room)
        elif not fits(start, room):
            continue
        spans = {a: (int(s), sizes[a]) for a, s in zip(indexed, start, strict=True)}
        found.append((place, spans))
    return found
