"""Streams: the bytes of windows, computed as they are sent.

A window may be larger than this machine's memory, so it is computed in blocks of a few
megabytes: whole rows in row-major order, all blocks of one shape (the last one begins
earlier and gives up what it shares with the one before), so that one executable makes
them all. One block is computed while the one before it is handed to the transport, and
the transport takes no more than its flow control allows: a reader that is slow or
asleep costs two blocks and what the connection buffers, and nothing of it grows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np
import xxhash

from shardinit.core.run.lazy import LazyArray, LazyTree
from shardinit.errors import SelectError, SpecError
from shardinit.service.server.config import Config
from shardinit.service.wire import frames
from shardinit.v1 import service_pb2


@dataclass(frozen=True)
class Wanted:
    """A window that was asked for and lies inside its leaf.

    Attributes:
      leaf: the ``LazyArray``.
      start, shape: of the window.
    """

    leaf: LazyArray
    start: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the window."""
        return math.prod(self.shape) * self.leaf.dtype.itemsize


def read_windows(
    request: service_pb2.StreamShardsRequest, tree: LazyTree
) -> list[Wanted]:
    """The windows of a request, all held against their leaves before any is computed.

    Raises:
      SpecError: unknown paths, windows that lie outside, a resume beyond the end.
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
        inside = len(start) == len(shape) == len(leaf.shape) and all(
            s + n <= size for s, n, size in zip(start, shape, leaf.shape, strict=True)
        )
        if not inside or min(shape, default=0) < 0:
            text = f"from {start} of shape {shape}; the leaf has {leaf.shape}"
            faults.append((f"windows[{i}]", text))
            continue
        found.append(Wanted(leaf, start, shape))
    if not faults and request.HasField("resume"):
        place = request.resume
        if place.window >= len(found) or place.offset > found[place.window].nbytes:
            text = f"window {place.window}, byte {place.offset}: there is none"
            faults.append(("resume", text))
    if faults:
        raise SpecError("windows", faults)
    return found


def send(
    windows: Sequence[Wanted],
    resume: service_pb2.ShardPosition,
    config: Config,
    pool: Executor,
    check: Callable[[], None],
) -> Iterator[bytes | service_pb2.StreamShardsResponse]:
    """The messages of a stream, from ``resume`` on; chunks come serialised.

    Args:
      windows: what to send.
      resume: where to begin.
      config: bytes to compute at a time, and of a chunk.
      pool: threads that compute a block ahead.
      check: called before every block; raises to end the stream.
    """
    block_bytes, step = config.block_bytes, config.limits.chunk_bytes
    for number in range(resume.window, len(windows)):
        window = windows[number]
        offset = resume.offset if number == resume.window else 0
        header = service_pb2.ShardHeader(
            window=number,
            shape=window.shape,
            dtype=str(window.leaf.dtype),
            size=window.nbytes,
            offset=offset,
        )
        yield service_pb2.StreamShardsResponse(header=header)
        digest, done = xxhash.xxh3_128(), 0
        computed = blocks(window, block_bytes)
        if window.nbytes > block_bytes:
            computed = _ahead(computed, pool)
        for block in computed:
            check()
            digest.update(block)
            for first in range(max(offset - done, 0), len(block), step):
                yield frames.write(done + first, block[first : first + step])
            done += len(block)
        end = service_pb2.ShardEnd(xxh3_128=digest.digest())
        yield service_pb2.StreamShardsResponse(end=end)


def blocks(window: Wanted, block_bytes: int) -> Iterator[memoryview]:
    """The window's bytes in order, ``block_bytes`` at most at a time."""
    if not window.nbytes:
        return
    leaf, origin = window.leaf, window.start
    if leaf.whole:  # one evaluation, whatever is read of it
        yield _bytes(leaf.read(origin, window.shape))
        return
    elements = block_bytes // leaf.dtype.itemsize
    for start, shape, skip in split_window(window.shape, elements):
        place = [a + b for a, b in zip(origin, start, strict=True)]
        yield _bytes(leaf.read(place, shape))[skip * leaf.dtype.itemsize :]


def _ahead(items: Iterator[memoryview], pool: Executor) -> Iterator[memoryview]:
    """The same items, each made while the one before it is used."""
    coming = pool.submit(next, items, None)
    while (item := coming.result()) is not None:
        coming = pool.submit(next, items, None)
        yield item


def split_window(
    shape: Sequence[int], elements: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], int]]:
    """Cuts a window into consecutive blocks of one shape.

    Args:
      shape: of the window; no dimension is 0.
      elements: number of elements of a block, at most.

    Yields:
      start and shape of each block, and how many of its leading elements have been
      in the block before.
    """
    axis, row = len(shape), 1  # `row`: elements of one index along `axis` - 1
    while axis and row * shape[axis - 1] <= elements:
        axis -= 1
        row *= shape[axis]
    if not axis:
        yield (0,) * len(shape), tuple(shape), 0
        return
    axis -= 1
    rows = shape[axis]
    step = -(-rows // -(-rows // max(elements // row, 1)))  # as even as it can be
    size = (1,) * axis + (step, *shape[axis + 1 :])
    for lead in np.ndindex(*shape[:axis]):
        for first in range(0, rows, step):
            start = min(first, rows - step)
            place = (*lead, start, *(0,) * (len(shape) - axis - 1))
            yield place, size, (first - start) * row


def _bytes(array: np.ndarray) -> memoryview:
    flat = np.ascontiguousarray(array).reshape(-1)
    return flat.view(np.uint8).data
