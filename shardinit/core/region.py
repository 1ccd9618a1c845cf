"""A region: the rectangle of a leaf that is asked for, sent, written or digested."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shardinit.errors import WindowError

Index = object
"""Ints, slices, ``...`` and None, alone or in a tuple; anything else is refused."""


@dataclass(frozen=True, slots=True)
class Region:
    """A rectangle of an array.

    Attributes:
      start: its first index along each axis.
      shape: its size along each axis; 0 is a size.

    Example:
      >>> region = Region((2, 0), (2, 8))
      >>> region.inside((4, 8)), region.size, region.slices
      (True, 16, (slice(2, 4, None), slice(0, 8, None)))
    """

    start: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def full(cls, shape: Sequence[int]) -> Region:
        """All of an array of that shape."""
        return cls((0,) * len(shape), tuple(shape))

    @classmethod
    def of_slices(cls, index: Sequence[slice], shape: Sequence[int]) -> Region:
        """What slices of step 1, as a shard's ``index``, take of an array."""
        bounds = [s.indices(n)[:2] for s, n in zip(index, shape, strict=True)]
        start = tuple(low for low, _ in bounds)
        return cls(start, tuple(high - low for low, high in bounds))

    @property
    def size(self) -> int:
        """Number of its elements."""
        return math.prod(self.shape)

    @property
    def slices(self) -> tuple[slice, ...]:
        """The index that takes it out of an array."""
        return tuple(
            slice(s, s + n) for s, n in zip(self.start, self.shape, strict=True)
        )

    def inside(self, shape: Sequence[int]) -> bool:
        """Whether an array of that shape has all of it."""
        return len(self.start) == len(self.shape) == len(shape) and all(
            min(s, n) >= 0 and s + n <= size
            for s, n, size in zip(self.start, self.shape, shape, strict=True)
        )

    def within(self, other: Region) -> Region:
        """This region of what ``other`` is, as a region of the array itself."""
        start = tuple(a + b for a, b in zip(other.start, self.start, strict=True))
        return Region(start, self.shape)

    def overlap(self, other: Region) -> Region:
        """What both have of an array; its size is 0 if they have nothing."""
        start = tuple(map(max, self.start, other.start))
        ends = [
            min(a + n, b + m)
            for a, n, b, m in zip(
                self.start, self.shape, other.start, other.shape, strict=True
            )
        ]
        return Region(
            start, tuple(max(0, b - a) for a, b in zip(start, ends, strict=True))
        )

    def seen_from(self, other: Region) -> Region:
        """The way back from ``within``: this region as one of ``other``."""
        start = tuple(a - b for a, b in zip(self.start, other.start, strict=True))
        return Region(start, self.shape)


def covering(
    index: Index, shape: Sequence[int], where: str
) -> tuple[Region, tuple[slice | int | None, ...]]:
    """The smallest region that holds everything an index names.

    Args:
      index: ints, slices of any step, ``...`` and ``None``, as numpy takes them.
      shape: of the array that is indexed.
      where: what errors call that array.

    Returns:
      The region, and the index that remains to be applied to it.

    Raises:
      IndexError: too many indices, or one out of bounds.
      TypeError: an index that numpy would call advanced.
    """
    starts, sizes, rest = [], [], []
    axes = iter(enumerate(shape))
    for entry in _expanded(index, len(shape), where):
        if entry is None:
            rest.append(None)
            continue
        axis, size = next(axes)
        if isinstance(entry, slice):
            chosen = _chosen(entry, size, where)
            low = min(chosen[0], chosen[-1]) if chosen else 0
            starts.append(low)
            sizes.append(abs(chosen[-1] - chosen[0]) + 1 if chosen else 0)
            rest.append(slice(None, None, entry.step))
        else:
            place = _integer(entry, axis, size, where)
            starts.append(place)
            sizes.append(1)
            rest.append(0)
    return Region(tuple(starts), tuple(sizes)), tuple(rest)


def _chosen(entry: slice, size: int, where: str) -> range:
    try:
        return range(*entry.indices(size))
    except (TypeError, ValueError) as error:
        raise WindowError(
            where, f"got {entry}: {error}", "a slice of ints, such as slice(0, 2)"
        ) from None


def _expanded(index: Index, rank: int, where: str) -> list[object]:
    """The index with ``...`` and what is left out at its end written as slices."""
    entries = list(index) if isinstance(index, tuple) else [index]
    dots = [i for i, entry in enumerate(entries) if entry is Ellipsis]
    used = sum(entry is not None and entry is not Ellipsis for entry in entries)
    if used > rank or len(dots) > 1:
        raise WindowError(
            where,
            f"got {used} indices and {len(dots)} '...'",
            f"at most {rank} and one",
        )
    at = dots[0] if dots else len(entries)
    fill = [slice(None)] * (rank - used)
    return [*entries[:at], *fill, *entries[at + 1 :]]


def _integer(entry: Any, axis: int, size: int, where: str) -> int:
    try:
        # To numpy True is a mask, which adds an axis; to ``operator.index`` it is 1.
        if isinstance(entry, bool):
            raise TypeError
        place = operator.index(entry)
    except TypeError:
        raise WindowError(
            where,
            f"got an index of type {type(entry).__name__}",
            "ints, slices or '...'",
            "Read the window first, then index the numpy array",
        ) from None
    if not -size <= place < size:
        raise WindowError(
            where,
            f"index {place} is out of bounds for axis {axis} of size {size}",
            f"an index below {size}",
        )
    return place % size
