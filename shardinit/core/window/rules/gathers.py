"""Gathers: elements at places that an array names.

Indices known while tracing (``x[table]``) say where the operand's elements lie. Drawn
indices (``choice``) say it only once they are made, so what they index has to be a
table of constants.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jax import lax

from shardinit.core.ir.graph import Node
from shardinit.core.types import Coords, Values, Words
from shardinit.core.window.coordinates import ZERO, add, select, u32
from shardinit.core.window.reasons import require
from shardinit.core.window.rules.bits import take
from shardinit.core.window.rules.rule import At, Full, Later, Steps, rule


@rule("gather", picks=True)
def _gather(node: Node, which: int, coords: Coords) -> Steps:
    require(not node.params["dimension_numbers"].operand_batching_dims)
    if _known_inside(node):
        return (yield At(0, _gathered(node, coords, _known_starts(node, coords))))
    require(node.inputs[1].const is None)
    table = yield Full(0)
    index = yield Later(1)
    starts, inside = [], None
    places = _batch_places(node, coords)
    # The components of an index lie along the last axis; each is wanted.
    for component, last in enumerate(_room(node)):
        drawn = _widened(index((*places, u32(component))))
        top = np.asarray(last, drawn.dtype)
        held = lax.clamp(np.asarray(0, drawn.dtype), drawn, top)
        fits = lax.eq(held, drawn)
        inside = fits if inside is None else lax.bitwise_and(inside, fits)
        starts.append(held.astype(np.uint32))
    value = take(table.reshape(-1), table.shape, _gathered(node, coords, starts))
    if not is_mode(node, "FILL_OR_DROP") or inside is None:
        return value
    return select(inside, value, _fill(node))


def _widened(index: Values) -> Values:
    """Indices that can be held against any place: a table may outgrow their dtype."""
    narrow = np.dtype(index.dtype).itemsize < 4
    return lax.convert_element_type(index, np.int32) if narrow else index


def is_mode(node: Node, name: str) -> bool:
    """Whether what lies outside is treated so; XLA moves it inside by default."""
    mode = node.params["mode"]
    return getattr(mode, "name", str(mode)) == name


def fits(starts: np.ndarray, room: np.ndarray) -> np.ndarray | np.bool_:
    """For each start whether its window lies inside; ``room``: the last that does."""
    return np.all((starts >= 0) & (starts <= room), axis=-1)


def _known_inside(node: Node) -> bool:
    """The indices are known, and lie inside wherever outside would mean a fill."""
    const = node.inputs[1].const
    if const is None:
        return False
    inside = fits(np.asarray(const).astype(np.int64), _room(node))
    return bool(inside.all()) or not is_mode(node, "FILL_OR_DROP")


def _room(node: Node) -> np.ndarray:
    """The last start along each indexed axis of the operand."""
    dims = node.params["dimension_numbers"]
    shape, sizes = node.inputs[0].shape, node.params["slice_sizes"]
    return np.asarray([shape[a] - sizes[a] for a in dims.start_index_map], np.int64)


def _batch_places(node: Node, coords: Coords) -> Coords:
    """Which index an element of the result belongs to."""
    dims = node.params["dimension_numbers"]
    return tuple(c for a, c in enumerate(coords) if a not in dims.offset_dims)


def _known_starts(node: Node, coords: Coords) -> list[Values]:
    starts = np.asarray(node.inputs[1].const).astype(np.int64)
    starts = np.clip(starts, 0, _room(node)).astype(np.uint32)
    places = _batch_places(node, coords)
    return [
        take(starts[..., i].reshape(-1), node.inputs[1].shape[:-1], places)
        for i in range(starts.shape[-1])
    ]


def _gathered(node: Node, coords: Coords, starts: Sequence[Values]) -> Coords:
    """Where the operand's elements lie, given where their slices start."""
    dims = node.params["dimension_numbers"]
    rank = node.inputs[0].ndim
    inner = [a for a in range(rank) if a not in dims.collapsed_slice_dims]
    at: list[Words] = [ZERO] * rank
    for axis, offset in zip(inner, dims.offset_dims, strict=True):
        at[axis] = coords[offset]
    for axis, start in zip(dims.start_index_map, starts, strict=True):
        at[axis] = start if at[axis] is ZERO else add(at[axis], start)
    return tuple(at)


def _fill(node: Node) -> np.ndarray:
    """What lies outside: the given value, else NaN, the least or the largest."""
    dtype = np.dtype(node.outputs[0].dtype)
    given = node.params["fill_value"]
    if given is not None:
        return np.asarray(given, dtype)
    if dtype.kind in "fcV":
        return np.asarray(np.nan).astype(dtype)
    if dtype.kind == "i":
        return np.asarray(np.iinfo(dtype).min, dtype)
    return np.asarray(dtype.kind == "b" or np.iinfo(dtype).max, dtype)
