"""Transfer: windows from a service into numpy arrays, whatever the connection does.

What comes is checked as it comes: each chunk by its place and CRC, each window by its
shape before anything is allocated and by its digest at the end. A stream that breaks,
or reaches its deadline, is asked for again from the byte that comes next, as long as
each attempt gets further than the one before; the digest of the whole window then
tells whether both ends of it came from the same computation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import crc32c
import numpy as np
import xxhash

from shardinit.core.region import Region
from shardinit.errors import ServiceError
from shardinit.service.client.connection import Connection
from shardinit.service.client.retrying import attempts
from shardinit.service.wire import frames
from shardinit.service.wire.description import LeafDescription
from shardinit.service.wire.fields import KEY_TYPES
from shardinit.service.wire.limits import DEFAULTS
from shardinit.v1 import service_pb2, spec_pb2

_RESUMABLE = ("UNAVAILABLE", "DATA_LOSS", "DEADLINE_EXCEEDED", "CANCELLED", "ABORTED")


@dataclass(frozen=True)
class Piece:
    """A window that is wanted.

    Attributes:
      path: of its leaf.
      region: of that leaf.
      dtype: element type.
    """

    path: str
    region: Region
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the window."""
        return self.region.size * self.dtype.itemsize

    @property
    def window(self) -> service_pb2.Window:
        """As it is asked for."""
        region = self.region
        return service_pb2.Window(
            path=self.path, start=region.start, shape=region.shape
        )


def receive(
    connection: Connection,
    spec: spec_pb2.ModelSpec,
    key: service_pb2.RootKey,
    pieces: Sequence[Piece],
    moved: Callable[[int], None] = lambda count: None,
) -> Iterator[np.ndarray]:
    """The windows in order, each when it is complete and checked.

    Args:
      connection: to the service.
      spec: the model.
      key: the root key.
      pieces: what is wanted.
      moved: called with the number of bytes whenever some have come.

    Raises:
      SpecError: the service finds faults in the request.
      ServiceError: the windows could not be had.
    """
    for batch in _batches(pieces):
        request = service_pb2.StreamShardsRequest(spec=spec, key=key)
        request.windows.extend(piece.window for piece in batch)
        yield from _Incoming(connection, request, batch, moved)


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """The pieces in as few requests as the limits allow."""
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        more = piece.window.ByteSize() + 8  # and what stands before it
        # A request over the limit is refused by gRPC itself before the service sees it:
        # RESOURCE_EXHAUSTED, and no word of which part was too large.
        if batch and (
            size + more > DEFAULTS.request_bytes // 2 or len(batch) == DEFAULTS.windows
        ):
            yield batch
            batch, size = [], 0
        batch.append(piece)
        size += more
    if batch:
        yield batch


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
        self._last: np.ndarray | None = None
        self._restart()

    def _restart(self) -> None:
        self._buffer: np.ndarray | None = None
        self._digest = xxhash.xxh3_128()
        self._offset = 0

    def __iter__(self) -> Iterator[np.ndarray]:
        for attempt in attempts(_RESUMABLE, lambda: (self._at, self._offset)):
            with attempt:
                if self._at < len(self._pieces):
                    yield from self._rest()
        if self._last is not None:
            yield self._last

    def _rest(self) -> Iterator[np.ndarray]:
        """The windows that are still missing, by one call, but the last.

        That is kept until the call has ended: whoever wants no more after it does not
        go on, and the service would see a call that its caller gave up.
        """
        self._request.resume.window = self._at
        self._request.resume.offset = self._offset
        with self._connection.stream(
            "StreamShards", self._request, read=frames.read
        ) as messages:
            for message in messages:
                array = self._take(message)
                if array is not None and self._at < len(self._pieces):
                    yield array
                elif array is not None:
                    self._last = array
        if self._at < len(self._pieces):
            raise self._damaged("the stream ended before the last window")

    def _take(
        self, message: frames.Chunk | service_pb2.StreamShardsResponse
    ) -> np.ndarray | None:
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
            expected = (self._at, piece.region.shape, str(piece.dtype), self._offset)
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
        return buffer.view(piece.dtype).reshape(piece.region.shape)

    def _chunk(self, chunk: frames.Chunk) -> None:
        data, buffer = chunk.data, self._buffer
        end = self._offset + len(data)
        if buffer is None or chunk.offset != self._offset or not data:
            raise self._damaged(f"a chunk does not follow at byte {self._offset:,}")
        if end > buffer.size:
            raise self._damaged(f"the chunk at byte {self._offset:,} is too long")
        taken = buffer.data[self._offset : end]  # in the cache for what reads it next
        taken[:] = data
        if crc32c.crc32c(taken) != chunk.crc32c:
            raise self._damaged(f"the chunk at byte {self._offset:,} is damaged")
        self._digest.update(taken)
        self._offset = end
        self._moved(len(data))

    def _damaged(self, got: str) -> ServiceError:
        at = min(self._at, len(self._pieces) - 1)
        where = f"StreamShards from {self._connection.target}, {self._pieces[at].path}"
        return ServiceError(where, got, "undamaged windows", code="DATA_LOSS")


def full_piece(leaf: LeafDescription) -> Piece:
    """All of a described leaf, of keys their words.

    Raises:
      ServiceError: its element type is unknown here.
    """
    # numpy alone knows no bfloat16 nor float8: np.dtype("float8_e4m3fn") is a TypeError
    # unless ml_dtypes has been imported.
    import ml_dtypes

    shape, name = leaf.shape, leaf.dtype
    if name in KEY_TYPES:
        shape, name = (*shape, KEY_TYPES[name][1]), "uint32"
    try:
        dtype = np.dtype(getattr(ml_dtypes, name, name))
    except TypeError as error:
        text = f"the element type {name!r} is unknown here"
        raise ServiceError("StreamShards", text, code="DATA_LOSS") from error
    return Piece(leaf.path, Region.full(shape), dtype)
