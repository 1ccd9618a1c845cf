"""Views: which elements of its storage a tensor is, and as a box of a grid.

A tensor of torch is a storage with a shape, strides and an offset. Slices, transposes,
columns, diagonals and thirds of a fused projection are all of one form: lay the storage
out as a grid whose strides divide each other, and the view is a rectangle of it with
its axes in another order. JAX can cut and set such a rectangle, and shardinit any
window of what comes out.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from shardinit.errors import UnsupportedConfigError

_MAX_MASK = 1 << 28  # granules of a storage whose coverage is counted one by one


class Geometry(NamedTuple):
    """Where the elements of a view lie in its storage, counted in elements.

    Example:
      >>> Geometry((2, 3), (3, 1), 6).span
      (6, 12)
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, tensor: Any) -> Geometry:
        """The geometry of a ``torch.Tensor``."""
        return cls(
            tuple(tensor.size()), tuple(tensor.stride()), tensor.storage_offset()
        )

    @classmethod
    def whole(cls, length: int) -> Geometry:
        """All of a storage, as a vector."""
        return cls((length,), (1,), 0)

    @property
    def size(self) -> int:
        """Number of elements, an expanded one as often as it appears."""
        return math.prod(self.shape)

    @property
    def span(self) -> tuple[int, int]:
        """First element, and the one after the last."""
        if not self.size:
            return self.offset, self.offset
        steps = zip(self.shape, self.stride, strict=True)
        return self.offset, self.offset + 1 + sum((n - 1) * s for n, s in steps)

    @property
    def axes(self) -> list[int]:
        """The axes with more than one element in the storage, the longest stride first.

        An axis of one element moves nowhere, and along an expanded one nothing moves.
        """
        steps = enumerate(zip(self.shape, self.stride, strict=True))
        moving = [axis for axis, (n, s) in steps if n > 1 and s]
        return sorted(moving, key=lambda axis: -self.stride[axis])

    def covers(self, length: int) -> bool:
        """Whether it is every element of a storage of that length, each once."""
        if self.size != length or self.offset:
            return False
        expected = 1
        for axis in reversed(self.axes):
            if self.stride[axis] != expected:
                return False
            expected *= self.shape[axis]
        return expected == length

    def apart(self, other: Geometry) -> bool:
        """Whether no element is in both, as far as their spans tell."""
        return self.span[1] <= other.span[0] or other.span[1] <= self.span[0]


@dataclass(frozen=True)
class Box:
    """A view as a rectangle of the grid that its storage is laid out in.

    Attributes:
      grid: shape of the grid; its elements are the storage's, and padding at the end.
      starts: first element along each axis.
      sizes: number of elements along each axis.
    """

    grid: tuple[int, ...]
    starts: tuple[int, ...]
    sizes: tuple[int, ...]


def box(geometry: Geometry, length: int, shape: tuple[int, ...] = ()) -> Box | None:
    """A view as a rectangle, of a grid like ``shape`` where there is one.

    Args:
      geometry: the view.
      length: elements of its storage.
      shape: of the array whose elements, row by row, the storage holds.

    Returns:
      None if the view is no rectangle, as overlapping windows are not.

    Example:
      >>> box(Geometry((2, 4), (4, 1), 8), 24, (6, 4))
      Box(grid=(6, 4), starts=(2, 0), sizes=(2, 4))
      >>> box(Geometry((3,), (4,), 0), 9, (3, 3))  # a diagonal
      Box(grid=(3, 4), starts=(0, 0), sizes=(3, 1))
    """
    steps = [(geometry.stride[a], geometry.shape[a]) for a in geometry.axes]
    merged: list[tuple[int, int]] = []
    for stride, size in steps:
        if merged and merged[-1][0] == stride * size:
            merged[-1] = stride, merged[-1][1] * size
        else:
            merged.append((stride, size))
    own = {stride for stride, _ in steps}
    like = set(_strides(shape))
    for strides, parts in ((own | like, steps), (own, steps), (like, merged)):
        found = _on_grid(strides | {1}, dict(parts), geometry.offset, length)
        if found is not None:
            return found
    return _on_grid({s for s, _ in merged} | {1}, dict(merged), geometry.offset, length)


def _strides(shape: Iterable[int]) -> list[int]:
    sizes = list(shape)
    return [math.prod(sizes[axis + 1 :]) for axis, n in enumerate(sizes) if n > 1]


def _on_grid(
    strides: set[int], sizes: dict[int, int], offset: int, length: int
) -> Box | None:
    chain = sorted(strides, reverse=True)
    if not set(sizes) <= strides or 0 in strides:
        return None
    if any(long % short for long, short in itertools.pairwise(chain)):
        return None
    grid = (
        -(-length // chain[0]),
        *(long // short for long, short in itertools.pairwise(chain)),
    )
    starts = []
    for stride in chain:
        start, offset = divmod(offset, stride)
        starts.append(start)
    counts = tuple(sizes.get(stride, 1) for stride in chain)
    fit = zip(starts, counts, grid, strict=True)
    if not all(start + count <= room for start, count, room in fit):
        return None
    return Box(grid, tuple(starts), counts)


def covered(view: Geometry, pieces: Iterable[Geometry], length: int) -> bool:
    """Whether every element of a view is in one of the pieces.

    Args:
      view: the elements that are asked for.
      pieces: those that were written.
      length: of their storage.

    Raises:
      UnsupportedConfigError: the pieces are too ragged to be counted.
    """
    pieces = [piece for piece in pieces if piece.size]
    if any(piece == view or piece.covers(length) for piece in pieces):
        return True
    grain = math.gcd(length, *(_grain(piece) for piece in (view, *pieces)))
    if length // grain > _MAX_MASK:
        raise UnsupportedConfigError(
            "a tensor", f"{len(pieces)} ragged writes into {length} elements"
        )
    mask = np.zeros(length // grain, bool)
    for piece in pieces:
        _coarse(mask, piece, grain)[...] = True
    return bool(_coarse(mask, view, grain).all())


def _grain(view: Geometry) -> int:
    """The largest granule of which the view is made of whole ones."""
    run, outer = 1, []
    for axis in reversed(view.axes):
        if view.stride[axis] == run:
            run *= view.shape[axis]
        else:
            outer.append(view.stride[axis])
    return math.gcd(view.offset, run, *outer)


def _coarse(mask: np.ndarray, view: Geometry, grain: int) -> np.ndarray:
    """The granules of a view in a mask of granules."""
    run, shape, strides = 1, [], []
    for axis in reversed(view.axes):
        size, stride = view.shape[axis], view.stride[axis]
        if stride == run:
            run *= size
        else:
            shape.append(size)
            strides.append(stride // grain)
    shape.append(run // grain)
    strides.append(1)
    return np.lib.stride_tricks.as_strided(
        mask[view.offset // grain :], shape, strides, writeable=True
    )
