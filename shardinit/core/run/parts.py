"""Parts: rectangles that are the same numbers in a leaf and in a tensor.

Two namings of one model hold the same numbers in other shapes: axes merged and swapped,
several leaves one tensor, one leaf several. A `Part` says which rectangle of which leaf
is which rectangle of which tensor. It is enough to read any window of either by windows
of the other, without ever holding one in full.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from shardinit.core.types import DType

Read = Callable[[str, tuple[int, ...], tuple[int, ...]], np.ndarray]
"""Reads a window, by name, start and shape."""
Span = tuple[int, int]


@dataclass(frozen=True)
class Part:
    """A rectangle of a leaf that is one of a tensor.

    Attributes:
      path: of the leaf.
      tensor: name of the tensor.
      lead: the part's index along the leaf's stacked axes.
      shape: of the leaf without those.
      lens: how many of these axes become each axis of the matrix between the two.
      swap: the tensor has the matrix's axes in reverse.
      spans: begin and end of the part along each axis of the matrix; default all.
      at: the part's index along the tensor's stacked axes.
      offset: where it begins along the tensor's other axes; default 0.
      lead_axis: the first of the leaf's stacked axes.
      at_axis: the first of the tensor's.
    """

    path: str
    tensor: str
    lead: tuple[int, ...]
    shape: tuple[int, ...]
    lens: tuple[int, ...]
    swap: bool = False
    spans: tuple[Span, ...] | None = None
    at: tuple[int, ...] = ()
    offset: tuple[int, ...] = ()
    lead_axis: int = 0
    at_axis: int = 0

    @property
    def groups(self) -> list[tuple[int, ...]]:
        """The leaf's sizes, those together that become one axis of the matrix."""
        ends = itertools.accumulate(self.lens, initial=0)
        return [self.shape[a:b] for a, b in itertools.pairwise(ends)]

    @property
    def size(self) -> tuple[Span, ...]:
        """Begin and end of the part along each axis of the matrix."""
        return self.spans or tuple((0, math.prod(group)) for group in self.groups)

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """The part's shape in the tensor."""
        sizes = tuple(end - begin for begin, end in self.size)
        return sizes[::-1] if self.swap else sizes

    def named(self, tensor: str) -> Part:
        """The same part of another tensor."""
        return replace(self, tensor=tensor)

    def cut(self, tensor: str, axis: int, number: int, count: int) -> Part:
        """One of ``count`` equal parts along an axis of the tensor."""
        spans = list(self.size)
        axis = len(spans) - 1 - axis if self.swap else axis
        begin, end = spans[axis]
        width = (end - begin) // count
        spans[axis] = (begin + number * width, begin + (number + 1) * width)
        return replace(self, tensor=tensor, spans=tuple(spans))

    def placed(
        self, at: tuple[int, ...], axis: int, offset: int, at_axis: int = 0
    ) -> Part:
        """The part where it lies in its tensor."""
        offsets = [0] * len(self.tensor_shape)
        if offsets:
            offsets[axis] = offset
        return replace(self, at=at, offset=tuple(offsets), at_axis=at_axis)

    def in_tensor(self, spans: Sequence[Span]) -> list[Span]:
        """A rectangle of the matrix, inside the tensor without its leading axes."""
        found = [
            (a - begin, b - begin)
            for (a, b), (begin, _) in zip(spans, self.size, strict=True)
        ]
        found = found[::-1] if self.swap else found
        return [(a + o, b + o) for (a, b), o in zip(found, self.offset, strict=True)]

    def in_matrix(self, box: Sequence[Span]) -> list[Span]:
        """The way back from ``in_tensor``, cut to the part; spans may be empty."""
        found = [(a - o, b - o) for (a, b), o in zip(box, self.offset, strict=True)]
        found = found[::-1] if self.swap else found
        return [
            (max(begin, a + begin), min(end, b + begin))
            for (a, b), (begin, end) in zip(found, self.size, strict=True)
        ]

    def read_leaf(self, spans: Sequence[Span], read: Read) -> np.ndarray:
        """A rectangle of the matrix from the leaf, its axes as the tensor's."""
        starts: list[int] = list(self.lead)
        sizes, crops, merged = [1] * len(self.lead), [], []
        for dims, (begin, end) in zip(self.groups, spans, strict=True):
            box, low = _covering(dims, begin, end)
            starts += [a for a, _ in box]
            sizes += [n for _, n in box]
            merged.append(math.prod(n for _, n in box))
            crops.append(slice(begin - low, end - low))
        begin, size = (
            _inner(x, self.lead_axis, len(self.lead)) for x in (starts, sizes)
        )
        array = read(self.path, begin, size).reshape(merged)[tuple(crops)]
        return array.T if self.swap else array

    def read_tensor(self, spans: Sequence[Span], read: Read) -> np.ndarray:
        """A rectangle of the matrix from the tensor, its axes as the matrix's."""
        inside = self.in_tensor(spans)
        shape = [b - a for a, b in inside]
        begin = (*self.at, *(a for a, _ in inside))
        size = (*[1] * len(self.at), *shape)
        window = (_inner(x, self.at_axis, len(self.at)) for x in (begin, size))
        array = read(self.tensor, *window).reshape(shape)
        return array.T if self.swap else array

    def runs(
        self, box: Sequence[Span]
    ) -> Iterator[tuple[tuple[Span, ...], tuple[slice, ...]]]:
        """The rectangles of the matrix that make a rectangle of the leaf.

        Yields:
          Each of them, and its place inside the leaf's rectangle.
        """
        ends = itertools.pairwise(itertools.accumulate(self.lens, initial=0))
        axes = zip(self.groups, ends, self.size, strict=True)
        runs = [list(_runs(dims, box[a:b], clip)) for dims, (a, b), clip in axes]
        for chosen in itertools.product(*runs):
            spans, places = zip(*chosen, strict=True) if chosen else ((), ())
            yield spans, tuple(itertools.chain(*places))


@dataclass(frozen=True)
class Tensor:
    """A tensor of the other naming.

    Attributes:
      name: its name.
      shape: its shape.
      parts: the parts that it is of.
      noise: standard deviation of what is to be added to it.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    noise: float = 0.0

    @classmethod
    def stacked(
        cls,
        name: str,
        lead: tuple[int, ...],
        inner: tuple[int, ...],
        parts: Iterable[Part],
        noise: float = 0.0,
    ) -> Tensor:
        """A tensor of parts, with the axes along which they are stacked."""
        placed = tuple(parts)
        shape = _inner((*lead, *inner), placed[0].at_axis, len(lead))
        return cls(name, shape, placed, noise)

    @classmethod
    def alone(cls, path: str, shape: tuple[int, ...], name: str) -> Tensor:
        """A tensor that is a leaf as it is."""
        part = Part(path, name, (), shape, (1,) * len(shape))
        return cls(name, shape, (part.placed((), 0, 0),))

    def read(
        self, start: Sequence[int], shape: Sequence[int], dtype: DType, read: Read
    ) -> np.ndarray:
        """A window, from windows of the leaves.

        Args:
          start: its first index along each axis.
          shape: its size along each axis.
          dtype: of the tensor.
          read: reads the leaves.
        """
        lead, axis = len(self.parts[0].at), self.parts[0].at_axis
        start, shape = (_outer(x, axis, lead) for x in (start, shape))
        out = np.empty(shape, dtype)
        for part in self.parts:
            place = _inside(part.at, start, shape)
            if place is None:
                continue
            box = [(s, s + n) for s, n in zip(start[lead:], shape[lead:], strict=True)]
            spans = part.in_matrix(box)
            if any(a >= b for a, b in spans):
                continue
            inside = zip(part.in_tensor(spans), box, strict=True)
            into = [slice(a - s, b - s) for (a, b), (s, _) in inside]
            out[(*place, *into)] = part.read_leaf(spans, read)
        return np.moveaxis(out, range(lead), range(axis, axis + lead))


def by_leaf(tensors: Iterable[Tensor]) -> dict[str, list[Part]]:
    """The parts that each leaf is of."""
    found: dict[str, list[Part]] = {}
    for tensor in tensors:
        for part in tensor.parts:
            found.setdefault(part.path, []).append(part)
    return found


def read_leaf(
    parts: Sequence[Part],
    start: Sequence[int],
    shape: Sequence[int],
    dtype: DType,
    read: Read,
) -> np.ndarray:
    """A window of a leaf, from windows of the tensors.

    Args:
      parts: those of the leaf.
      start: its first index along each axis.
      shape: its size along each axis.
      dtype: of the leaf.
      read: reads the tensors.
    """
    lead, axis = len(parts[0].lead), parts[0].lead_axis
    start, shape = (_outer(x, axis, lead) for x in (start, shape))
    out = np.empty(shape, dtype)
    for part in parts:
        place = _inside(part.lead, start, shape)
        if place is None:
            continue
        box = [(s, s + n) for s, n in zip(start[lead:], shape[lead:], strict=True)]
        for spans, into in part.runs(box):
            view = out[(*place, *into)]
            view[...] = part.read_tensor(spans, read).reshape(view.shape)
    return np.moveaxis(out, range(lead), range(axis, axis + lead))


def _inside(
    index: Sequence[int], start: Sequence[int], shape: Sequence[int]
) -> list[int] | None:
    """An index along the first axes of an array, in a window; None if outside."""
    place = [i - s for i, s in zip(index, start, strict=False)]
    within = all(0 <= p < n for p, n in zip(place, shape, strict=False))
    return place if within else None


def _outer(sizes: Sequence[int], axis: int, count: int) -> tuple[int, ...]:
    """Sizes with the ``count`` axes that begin at ``axis`` in front."""
    end = axis + count
    return (*sizes[axis:end], *sizes[:axis], *sizes[end:])


def _inner(sizes: Sequence[int], axis: int, count: int) -> tuple[int, ...]:
    """The way back from ``_outer``."""
    rest = sizes[count:]
    return (*rest[:axis], *sizes[:count], *rest[axis:])


def _covering(
    dims: Sequence[int], begin: int, end: int
) -> tuple[list[tuple[int, int]], int]:
    """The smallest rectangle of merged axes around a range, and where that begins."""
    if not dims:
        return [], 0
    inner = math.prod(dims[1:])
    first, last = begin // inner, -(-end // inner)
    if last - first == 1 and len(dims) > 1:
        low = first * inner
        rest, more = _covering(dims[1:], begin - low, end - low)
        return [(first, 1), *rest], low + more
    return [(first, last - first), *((0, n) for n in dims[1:])], first * inner


def _runs(
    dims: Sequence[int], box: Sequence[Span], clip: Span
) -> Iterator[tuple[Span, tuple[slice, ...]]]:
    """The ranges of merged axes that a rectangle is, inside ``clip``.

    Yields:
      Begin and end of a range, and its place inside the rectangle.
    """
    if not dims:
        yield (0, 1), ()
        return
    begin, end = box[0]
    inner = math.prod(dims[1:])
    full = all((0, n) == span for n, span in zip(dims[1:], box[1:], strict=True))
    low, high = max(begin * inner, clip[0]), min(end * inner, clip[1])
    if full and low < high and low % inner == high % inner == 0:
        rows = slice(low // inner - begin, high // inner - begin)
        yield (low, high), (rows, *(slice(0, n) for n in dims[1:]))
        return
    for row in range(max(begin, clip[0] // inner), min(end, -(-clip[1] // inner))):
        shift = row * inner
        for (a, b), into in _runs(
            dims[1:], box[1:], (clip[0] - shift, clip[1] - shift)
        ):
            yield (a + shift, b + shift), (slice(row - begin, row - begin + 1), *into)
