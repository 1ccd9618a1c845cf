"""Indexing: elements at places that an array names, and the place of the largest.

Indices known while tracing (``x.at[0].set(0)``, ``x[table]``) say where to pull.
Indices that are drawn (``choice``) say it only on the way up, so what they index is a
table of constants. The largest along an axis inside the leaf's program
(``categorical``) is found in a loop over that axis, which holds one candidate for each
element and never the axis itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax import lax

from shardinit.core.ir.graph import Node
from shardinit.core.window.coordinates import (
    ZERO,
    Coords,
    add,
    least,
    less,
    select,
    spread,
    spread_to,
    sub,
    u32,
)
from shardinit.core.window.rules.rule import Rule
from shardinit.core.window.rules.sources import take

MAX_UPDATES = 64  # scattered windows that are worth a comparison each


def _mode(node: Node) -> str:
    mode = node.params["mode"]
    return getattr(mode, "name", str(mode))


def _fills(node: Node) -> bool:
    """Whether a gather fills what lies outside; XLA else moves it inside."""
    return _mode(node) == "FILL_OR_DROP"


def _fits(node: Node, starts: np.ndarray, room: np.ndarray) -> np.ndarray:
    """For each start whether its window lies inside; ``room``: the last that does."""
    return np.all((starts >= 0) & (starts <= room), axis=-1)


# ---- gather ------------------------------------------------------------------------


def _gather_axes(node: Node) -> tuple[list[int], list[int]]:
    """The result's batch axes, and the operand's axes that its offset axes run over."""
    dims = node.params["dimension_numbers"]
    batch = [a for a in range(node.outputs[0].ndim) if a not in dims.offset_dims]
    dropped = {*dims.collapsed_slice_dims, *dims.operand_batching_dims}
    inner = [a for a in range(node.inputs[0].ndim) if a not in dropped]
    return batch, inner


def _room(node: Node) -> np.ndarray:
    """The last start along each indexed axis of the operand."""
    dims = node.params["dimension_numbers"]
    shape, sizes = node.inputs[0].shape, node.params["slice_sizes"]
    return np.asarray([shape[a] - sizes[a] for a in dims.start_index_map], np.int64)


def _known_inside(node: Node) -> bool:
    """The indices are known, and lie inside wherever outside would mean a fill."""
    const = node.inputs[1].const
    if const is None or node.params["dimension_numbers"].operand_batching_dims:
        return False
    inside = _fits(node, np.asarray(const).astype(np.int64), _room(node))
    return bool(inside.all()) or not _fills(node)


def _gather_accepts(node: Node) -> bool:
    if _known_inside(node):
        return True
    dims = node.params["dimension_numbers"]
    return not dims.operand_batching_dims and node.inputs[1].const is None


def _gather_table(node: Node) -> tuple[int, ...]:
    return () if _known_inside(node) else (0,)


def _pull_gather(node: Node, which: int, coords: Coords) -> list[Coords | None]:
    batch, _ = _gather_axes(node)
    places = tuple(coords[a] for a in batch)
    if not _known_inside(node):
        # The components of an index lie along the last axis; each is wanted.
        return [None, None]
    starts = np.asarray(node.inputs[1].const).astype(np.int64)
    starts = np.clip(starts, 0, _room(node)).astype(np.uint32)
    batch_shape = node.inputs[1].shape[:-1]
    columns = [
        take(starts[..., i].reshape(-1), batch_shape, places)
        for i in range(starts.shape[-1])
    ]
    return [_gathered(node, coords, columns), None]


def _gathered(node: Node, coords: Coords, starts: Sequence[Any]) -> Coords:
    """Where the operand's elements lie, given where their slices start."""
    dims = node.params["dimension_numbers"]
    _, inner = _gather_axes(node)
    at: list[Any] = [ZERO] * node.inputs[0].ndim
    for axis, offset in zip(inner, dims.offset_dims, strict=True):
        at[axis] = coords[offset]
    for axis, start in zip(dims.start_index_map, starts, strict=True):
        at[axis] = start if at[axis] is ZERO else add(at[axis], start)
    return tuple(at)


def _push_gather(node: Node, which: int, coords: Coords, args: Sequence[Any]) -> Any:
    if _known_inside(node):
        return args[0]
    table, index = args
    batch, _ = _gather_axes(node)
    places = tuple(coords[a] for a in batch)
    room = _room(node)
    starts, inside = [], None
    for component, last in enumerate(room):
        drawn = index((*places, u32(component)))
        top = np.asarray(last, drawn.dtype)
        held = lax.clamp(np.asarray(0, drawn.dtype), drawn, top)
        fits = lax.eq(held, drawn)
        inside = fits if inside is None else lax.bitwise_and(inside, fits)
        starts.append(held.astype(np.uint32))
    at = _gathered(node, coords, starts)
    value = take(table.reshape(-1), table.shape, at)
    if not _fills(node) or inside is None:
        return value
    return select(inside, value, _fill(node))


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


# ---- scatter -----------------------------------------------------------------------

_COMBINE = {
    "scatter": lambda old, new: new,
    "scatter-add": lax.add,
    "scatter_add": lax.add,
    "scatter-mul": lax.mul,
    "scatter_mul": lax.mul,
    "scatter_min": lax.min,
    "scatter_max": lax.max,
    "scatter-min": lax.min,
    "scatter-max": lax.max,
}


def _windows(node: Node) -> list[tuple[tuple[int, ...], dict[int, tuple[int, int]]]]:
    """Each scattered window: its place among the indices, and axis to (start, size).

    Windows that would be dropped are left out.
    """
    dims = node.params["dimension_numbers"]
    operand, indices, updates = node.inputs
    starts = np.asarray(indices.const).astype(np.int64)
    free = [
        a
        for a in range(operand.ndim)
        if a not in dims.inserted_window_dims and a not in dims.operand_batching_dims
    ]
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
        if _mode(node) == "CLIP":
            start = np.clip(start, 0, room)
        elif not _fits(node, start, room):
            continue
        spans = {a: (int(s), sizes[a]) for a, s in zip(indexed, start, strict=True)}
        found.append((place, spans))
    return found


def _scatter_accepts(node: Node) -> bool:
    """Few windows, at known places, that do not overlap."""
    dims = node.params["dimension_numbers"]
    indices = node.inputs[1]
    if (
        len(node.inputs) != 3
        or indices.const is None
        or dims.operand_batching_dims
        or indices.size > MAX_UPDATES * max(indices.shape[-1], 1)
    ):
        return False
    spans = [span for _, span in _windows(node)]
    return not any(
        all(
            abs(one[axis][0] - other[axis][0]) < size for axis, (_, size) in one.items()
        )
        for one, other in itertools.combinations(spans, 2)
    )


def _pull_scatter(node: Node, which: int, coords: Coords) -> list[Coords | None]:
    return [coords, None, None]


def _push_scatter(node: Node, which: int, coords: Coords, args: Sequence[Any]) -> Any:
    out, _, updates = args
    dims = node.params["dimension_numbers"]
    combine = _COMBINE[node.name]
    free = [a for a in range(len(coords)) if a not in dims.inserted_window_dims]
    rank = node.inputs[2].ndim
    batch = [a for a in range(rank) if a not in dims.update_window_dims]
    for place, spans in _windows(node):
        at: list[Any] = [ZERO] * rank
        for axis, number in zip(batch, place, strict=True):
            at[axis] = u32(number)
        inside: Any = None
        for axis, (start, size) in spans.items():
            here = sub(coords[axis], u32(start))
            within = less(here, u32(size))
            inside = (
                within if inside is None else lax.bitwise_and(*spread([inside, within]))
            )
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


# ---- the place of the largest ------------------------------------------------------


def _fold_accepts(node: Node) -> bool:
    (axis,) = node.params["axes"]
    return 0 < node.inputs[0].shape[axis] < 1 << 31


def _pull_fold(node: Node, which: int, coords: Coords) -> list[Coords | None]:
    return [None]


def _push_fold(node: Node, which: int, coords: Coords, args: Sequence[Any]) -> Any:
    (values,) = args
    (axis,) = node.params["axes"]
    dtype = node.params["index_dtype"]
    beats = lax.gt if node.name == "argmax" else lax.lt

    def at(step: Any) -> Any:
        value = values((*coords[:axis], u32(step), *coords[axis:]))
        return spread([value, *coords])[0]

    def step(number: Any, best: Any) -> Any:
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


INDEXED: dict[str, Rule] = {
    **{
        name: Rule(_pull_fold, _push_fold, _fold_accepts, later=(0,), folds=True)
        for name in ("argmax", "argmin")
    },
    "gather": Rule(
        _pull_gather, _push_gather, _gather_accepts, table=_gather_table, later=(1,)
    ),
    **{
        name: Rule(_pull_scatter, _push_scatter, _scatter_accepts, later=(2,))
        for name in _COMBINE
    },
}
