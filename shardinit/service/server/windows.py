"""Windows: the bytes that come next of windows that were asked for.

A window may be larger than this machine's memory, so it is computed in blocks of a few
megabytes: whole rows in row-major order, all blocks of one shape (the last one begins
earlier and gives up what it shares with the one before), so that one executable makes
them all. Which block a byte lies in is arithmetic, so a worker keeps no place of any
stream: a reader that is slow or asleep costs it nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from shardinit.core.region import Region
from shardinit.core.run.lazy import LazyArray, LazyTree
from shardinit.errors import SelectError, ServiceError, SpecError, WholeLeafError
from shardinit.service.server.pipe import Piece
from shardinit.v1 import service_pb2

_SECONDS = (
    0.1  # after which no other piece is begun: somebody waits for those there are
)


@dataclass(frozen=True)
class Wanted:
    """A window that was asked for and lies inside its leaf.

    Attributes:
      leaf: the ``LazyArray``.
      region: the window's.
    """

    leaf: LazyArray
    region: Region

    @property
    def nbytes(self) -> int:
        """Bytes of the window."""
        return self.region.size * self.leaf.dtype.itemsize

    @cached_property
    def element(self) -> memoryview:
        """The bytes of any element of a uniform leaf."""
        return _bytes(self.leaf.read(self.region.start, (1,) * self.leaf.ndim))

    def from_byte(self, offset: int, most: int) -> memoryview:
        """The bytes that begin at ``offset``: one block, or what is left of it.

        Args:
          offset: less than the window's bytes.
          most: bytes of a block.
        """
        size = self.leaf.dtype.itemsize
        block, first = block_of(self.region.shape, most // size, offset // size)
        block = block.within(self.region)
        return _bytes(self.leaf.read(block.start, block.shape))[offset - first * size :]


def read(request: service_pb2.StreamShardsRequest, tree: LazyTree) -> list[Wanted]:
    """The windows of a request, all held against their leaves before any is computed.

    Raises:
      SpecError: unknown paths, windows that lie outside.
    """
    faults: list[tuple[str, str]] = []
    found: list[Wanted] = []
    for i, window in enumerate(request.windows):
        try:
            leaf = tree[window.path]
        except SelectError as error:
            faults.append((f"windows[{i}].path", str(error)))
            continue
        start = tuple(window.start) or (0,) * len(leaf.shape)
        rest = tuple(n - s for n, s in zip(leaf.shape, start, strict=False))
        shape = tuple(window.shape) or rest
        region = Region(start, shape)
        if not region.inside(leaf.shape):
            text = f"from {start} of shape {shape}; the leaf has {leaf.shape}"
            faults.append((f"windows[{i}]", text))
            continue
        found.append(Wanted(leaf, region))
    if faults:
        raise SpecError("windows", faults)
    return found


def too_large(error: WholeLeafError, call: str) -> ServiceError:
    """The refusal of a leaf that a worker would have to compute whole."""
    return ServiceError(
        f"{call}, {error.where}",
        error.got,
        error.expected.replace("memory_limit=", ""),
        "Ask for the program and run it, or serve with a larger --whole-bytes",
        code="RESOURCE_EXHAUSTED",
        limit="whole-bytes",
    )


def check_place(found: Sequence[Wanted], place: service_pb2.ShardPosition) -> None:
    """Refuses to go on at a place that is not there.

    Raises:
      SpecError: it is beyond the end.
    """
    if place.window >= len(found) or place.offset > found[place.window].nbytes:
        text = f"window {place.window}, byte {place.offset}: there is none"
        raise SpecError("windows", [("resume", text)])


def pieces(
    found: Sequence[Wanted], place: service_pb2.ShardPosition, most: int
) -> Iterator[Piece]:
    """The bytes that come next: a block, or several windows that are smaller together.

    A window's bytes lie in one or several pieces; an empty window is an empty piece,
    and a window of one number throughout is one element that comes many times.

    Args:
      found: all windows.
      place: where to begin.
      most: bytes of all pieces together.
    """
    window, offset, left = place.window, place.offset, most
    end = time.monotonic() + _SECONDS
    while window < len(found):
        wanted = found[window]
        rest = wanted.nbytes - offset
        size = wanted.leaf.dtype.itemsize if wanted.leaf.uniform else rest
        if left < most and (size > left or time.monotonic() > end):
            return
        data, times = memoryview(b""), 1
        if rest and wanted.leaf.uniform and not offset:
            data = wanted.element
            times = rest // len(data)
        elif rest:
            data = wanted.from_byte(offset, most)
        header = service_pb2.ShardHeader(
            window=window,
            shape=wanted.region.shape,
            dtype=str(wanted.leaf.dtype),
            size=wanted.nbytes,
            offset=offset,
        )
        yield Piece(header, data, times)
        left -= len(data)
        if len(data) * times < rest:
            return
        window, offset = window + 1, 0


def block_of(shape: Sequence[int], elements: int, at: int) -> tuple[Region, int]:
    """The block of a window that an element lies in; all blocks are of one shape.

    Args:
      shape: of the window; no dimension is 0.
      elements: number of elements of a block, at most.
      at: number of the element in the window.

    Returns:
      the block, and the number of its first element in the window.
    """
    axis, row = len(shape), 1  # `row`: elements of one index along `axis` - 1
    while axis and row * shape[axis - 1] <= elements:
        axis -= 1
        row *= shape[axis]
    if not axis:
        return Region.full(shape), 0
    axis -= 1
    rows = shape[axis]
    step = -(-rows // -(-rows // max(elements // row, 1)))  # as even as it can be
    lead, within = divmod(at, rows * row)
    first = min(within // row // step * step, rows - step)
    places = np.unravel_index(lead, shape[:axis]) if axis else ()
    start = (*map(int, places), first, *(0,) * (len(shape) - axis - 1))
    size = (1,) * axis + (step, *shape[axis + 1 :])
    return Region(start, size), (lead * rows + first) * row


def _bytes(array: np.ndarray) -> memoryview:
    flat = np.ascontiguousarray(array).reshape(-1)
    return flat.view(np.uint8).data
