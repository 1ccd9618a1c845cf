"""Shards: which rows of a tensor a rank holds, and the pieces they are computed in."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from shardinit.errors import ShardingError

PIECE = 16 << 20  # bytes that are computed at a time


def pieces(
    boxes: Sequence[Sequence[tuple[int, int]]], itemsize: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], tuple[slice, ...]]]:
    """The windows of a shard, and the place of each in it.

    A shard is one rectangle, unless it lies in strides. It is cut along its first axis
    into equal parts of bounded size: windows of one shape share an executable.

    Yields:
      Start and shape of a window of the tensor, and its place in the shard.

    Example:
      >>> from shardinit.frontends.torch.shards import pieces
      >>> [start for start, _, _ in pieces([[(0, 8)], [(16, 32)]], 1 << 20)]
      [(0, 16), (1, 16), (2, 16), (3, 16), (4, 16), (5, 16), (6, 16), (7, 16)]
    """
    columns = []
    for axis, runs in enumerate(boxes):
        column, end = [], 0
        for begin, stop in runs:
            rows = max(stop - begin, 1)
            if axis == 0:
                inner = math.prod(sum(b - a for a, b in other) for other in boxes[1:])
                parts = -(-rows * inner * itemsize // PIECE) or 1
                rows = -(-rows // min(parts, rows))
            for first in range(begin, max(stop, begin + 1), rows):
                count = min(rows, stop - first)
                place = end + first - begin
                column.append((first, count, slice(place, place + count)))
            end += stop - begin
        columns.append(column)
    for chosen in itertools.product(*columns):
        yield (
            tuple(first for first, _, _ in chosen),
            tuple(count for _, count, _ in chosen),
            tuple(place for _, _, place in chosen),
        )


def boxes_of(
    shape: tuple[int, ...], device_mesh: Any, placements: Sequence[Any]
) -> list[list[tuple[int, int]]]:
    """The ranges of each axis that this rank holds, cut by ``chunk`` as torch does.

    Raises:
      ShardingError: a placement that is no shard.

    Example:
      >>> from shardinit.frontends.torch.shards import boxes_of
      >>> boxes_of((8, 32), None, ())  # of a tensor that is no DTensor
      [[(0, 8)], [(0, 32)]]
    """
    rows = [np.arange(size) for size in shape]
    place = device_mesh.get_coordinate() if placements else None
    for axis, placement in enumerate(placements):
        kind = type(placement).__name__
        if kind == "Replicate":
            continue
        if kind not in ("Shard", "_StridedShard") or place is None:
            raise ShardingError(
                f"placement {placement!r}",
                "it is no shard",
                "Shard(dim) or Replicate()",
            )
        count, mine = device_mesh.size(axis), place[axis]
        held, dim = rows[placement.dim], placement.dim
        strides = int(getattr(placement, "split_factor", 1))
        cut = [_chunk(_chunk(held, strides, i), count, mine) for i in range(strides)]
        rows[dim] = np.concatenate(cut)
    return [_runs(held) for held in rows]


def _chunk(rows: np.ndarray, count: int, number: int) -> np.ndarray:
    # Of 9 rows on 4 ranks torch gives 3, 3, 3 and none; JAX has no sharding for that.
    size = -(-len(rows) // count)
    return rows[number * size : (number + 1) * size]


def _runs(rows: np.ndarray) -> list[tuple[int, int]]:
    """Ranges of consecutive numbers; one empty range if there are none."""
    if not len(rows):
        return [(0, 0)]
    ends = np.flatnonzero(np.diff(rows) != 1) + 1
    return [(int(run[0]), int(run[-1]) + 1) for run in np.split(rows, ends)]
