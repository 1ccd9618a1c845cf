"""Transfer: windows from a service into numpy arrays, whatever the connection does.

What comes is checked as it comes: each chunk by its place and CRC, each window by its
shape before anything is allocated and by its digest at the end. A stream that breaks,
or reaches its deadline, is asked for again from the byte that comes next, as long as
each attempt gets further than the one before; the digest of the whole window then
tells whether both ends of it came from the same computation.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import crc32c
import numpy as np
import xxhash

from shardinit.errors import ServiceError
from shardinit.service import frames
from shardinit.service.connection import Connection
from shardinit.service.limits import Limits
from shardinit.v1 import service_pb2, spec_pb2

_ATTEMPTS = 8  # without a byte between them
_RESUMABLE = ("UNAVAILABLE", "DATA_LOSS", "DEADLINE_EXCEEDED", "CANCELLED", "ABORTED")


@dataclass(frozen=True)
class Piece:
    """A window that is wanted.

    Attributes:
      path: of its leaf.
      start: first index along each axis.
      shape: number of indices along each axis.
      dtype: element type.
    """

    path: str
    start: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the window."""
        return math.prod(self.shape) * self.dtype.itemsize


def receive(
    connection: Connection,
    spec: spec_pb2.ModelSpec,
    key: service_pb2.RootKey,
    pieces: Sequence[Piece],
    limits: Limits,
    moved: Callable[[int], None] = lambda count: None,
) -> Iterator[np.ndarray]:
    """The windows in order, each when it is complete and checked.

    Args:
      connection: to the service.
      spec: the model.
      key: the root key.
      pieces: what is wanted.
      limits: caps on requests.
      moved: called with the number of bytes whenever some have come.

    Raises:
      SpecError: the service finds faults in the request.
      ServiceError: the windows could not be had.
    """
    request = service_pb2.StreamShardsRequest(spec=spec, key=key)
    room = limits.request_bytes // 2
    batch: list[Piece] = []
    for piece in pieces:
        window = service_pb2.Window(
            path=piece.path, start=piece.start, shape=piece.shape
        )
        room -= window.ByteSize() + 8
        if batch and (room < 0 or len(batch) == limits.windows):
            yield from _Incoming(connection, request, batch, moved)
            request = service_pb2.StreamShardsRequest(spec=spec, key=key)
            room, batch = limits.request_bytes // 2 - window.ByteSize() - 8, []
        request.windows.append(window)
        batch.append(piece)
    if batch:
        yield from _Incoming(connection, request, batch, moved)


class _Incoming:
    """The windows of one request: where it is, and what has come of the window there.

    Iterating it makes the calls.
    """

    def __init__(
        self,
        connection: Connection,
        request: service_pb2.StreamShardsRequest,
        pieces: Sequence[Piece],
        moved: Callable[[int], None],
    ):
        self._connection = connection
        self._request = request
        self._pieces = pieces
        self._moved = moved
        self._at = 0
        self._restart()

    def _restart(self) -> None:
        self._buffer: np.ndarray | None = None
        self._digest = xxhash.xxh3_128()
        self._offset = 0

    def __iter__(self) -> Iterator[np.ndarray]:
        failures, reached = 0, (0, 0)
        while self._at < len(self._pieces):
            self._request.resume.window = self._at
            self._request.resume.offset = self._offset
            try:
                with self._connection.stream(
                    "StreamShards", self._request, read=frames.read
                ) as messages:
                    for message in messages:
                        array = self._take(message)
                        if array is not None:
                            yield array
                if self._at < len(self._pieces):
                    raise self._damaged("the stream ended before the last window")
            except ServiceError as error:
                place = (self._at, self._offset)
                failures = 0 if place > reached else failures + 1
                slow = error.code == "DEADLINE_EXCEEDED" and failures
                if error.code not in _RESUMABLE or slow or failures == _ATTEMPTS:
                    raise
                reached = max(place, reached)
                time.sleep(min(0.1 * 2**failures, 2.0) if failures else 0.0)

    def _take(self, message: Any) -> np.ndarray | None:
        if self._at >= len(self._pieces):
            raise self._damaged("more windows than were asked for")
        piece = self._pieces[self._at]
        if isinstance(message, frames.Chunk):
            self._chunk(message)
            return None
        kind = message.WhichOneof("part")
        if kind == "header":
            header = message.header
            said = (header.window, tuple(header.shape), header.dtype, header.offset)
            expected = (self._at, piece.shape, str(piece.dtype), self._offset)
            if said != expected or header.size != piece.nbytes:
                raise self._damaged(f"a header {said}, expected {expected}")
            if self._buffer is None:
                self._buffer = np.empty(piece.nbytes, np.uint8)
            return None
        buffer = self._buffer
        if kind != "end" or buffer is None or self._offset != buffer.size:
            raise self._damaged("a window's end before its last byte")
        same = self._digest.digest() == message.end.xxh3_128
        self._restart()
        if not same:
            raise self._damaged("the digest of a window differs")
        self._at += 1
        return buffer.view(piece.dtype).reshape(piece.shape)

    def _chunk(self, chunk: frames.Chunk) -> None:
        data, buffer = chunk.data, self._buffer
        end = self._offset + len(data)
        if buffer is None or chunk.offset != self._offset or not data:
            raise self._damaged(f"a chunk does not follow at byte {self._offset:,}")
        if end > buffer.size or crc32c.crc32c(data) != chunk.crc32c:
            raise self._damaged(f"the chunk at byte {self._offset:,} is damaged")
        buffer[self._offset : end] = np.frombuffer(data, np.uint8)
        self._digest.update(data)
        self._offset = end
        self._moved(len(data))

    def _damaged(self, came: str) -> ServiceError:
        at = min(self._at, len(self._pieces) - 1)
        where = f"StreamShards from {self._connection.target}, {self._pieces[at].path}"
        return ServiceError(where, came, "undamaged windows", code="DATA_LOSS")


def dtype_of(name: str) -> np.dtype:
    """A dtype by name, those of ``ml_dtypes`` included.

    Raises:
      ServiceError: there is none of that name.
    """
    import ml_dtypes

    try:
        return np.dtype(getattr(ml_dtypes, name, name))
    except TypeError as error:
        text = f"the element type {name!r} is unknown here"
        raise ServiceError("StreamShards", text, code="DATA_LOSS") from error


def leaf_array(leaf: Any) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of a described leaf as bytes: keys are their words."""
    if leaf.dtype.startswith("key<"):
        words = 2 if leaf.dtype == "key<fry>" else 4
        return (*leaf.shape, words), np.dtype(np.uint32)
    return leaf.shape, dtype_of(leaf.dtype)
