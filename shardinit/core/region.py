"""Numpy's basic indexing as one contiguous window and what is left to do inside it."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

Window = tuple[tuple[int, ...], tuple[int, ...], tuple[slice | int | None, ...]]
Index = object
"""Ints, slices, ``...`` and None, alone or in a tuple; anything else is refused."""


def covering(index: Index, shape: Sequence[int], where: str) -> Window:
    """The smallest window that holds everything an index names.

    Args:
      index: ints, slices of any step, ``...`` and ``None``, as numpy takes them.
      shape: of the array that is indexed.
      where: what errors call that array.

    Returns:
      The window's start and shape, and the index that remains to be applied to it.

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
            chosen = range(*entry.indices(size))
            low = min(chosen[0], chosen[-1]) if chosen else 0
            starts.append(low)
            sizes.append(abs(chosen[-1] - chosen[0]) + 1 if chosen else 0)
            rest.append(slice(None, None, entry.step))
        else:
            place = _integer(entry, axis, size, where)
            starts.append(place)
            sizes.append(1)
            rest.append(0)
    return tuple(starts), tuple(sizes), tuple(rest)


def _expanded(index: Index, rank: int, where: str) -> list[object]:
    """The index with ``...`` and what is left out at its end written as slices."""
    entries = list(index) if isinstance(index, tuple) else [index]
    dots = [i for i, entry in enumerate(entries) if entry is Ellipsis]
    used = sum(entry is not None and entry is not Ellipsis for entry in entries)
    if used > rank or len(dots) > 1:
        raise IndexError(
            f"{where}: got {used} indices and {len(dots)} '...'; expected at most "
            f"{rank} and one"
        )
    at = dots[0] if dots else len(entries)
    fill = [slice(None)] * (rank - used)
    return [*entries[:at], *fill, *entries[at + 1 :]]


def _integer(entry: Any, axis: int, size: int, where: str) -> int:
    try:
        if isinstance(entry, bool):
            raise TypeError
        place = operator.index(entry)
    except TypeError:
        raise TypeError(
            f"{where}: got an index of type {type(entry).__name__}; expected ints, "
            f"slices or '...'. Read the window first, then index the numpy array"
        ) from None
    if not -size <= place < size:
        raise IndexError(
            f"{where}: index {place} is out of bounds for axis {axis} of size {size}"
        )
    return place % size
