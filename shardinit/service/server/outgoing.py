"""Outgoing: a stream of windows as the process that listens sends it.

It knows where the stream is and the digest of what it has seen of the window there, so
that any worker can compute the bytes that come next. The bytes are copied once, from
the memory that a worker shares with this process into the message that carries them.
A window of one number throughout needs no worker beyond its first element: its chunks
are made here, of one buffer, when they are sent.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import chain

import xxhash

from shardinit.errors import SpecError
from shardinit.service.server.pipe import Piece
from shardinit.service.wire import frames
from shardinit.v1 import service_pb2

Message = bytes | service_pb2.StreamShardsResponse


class Outgoing:
    """One stream.

    Args:
      request: what was asked, with the place where to begin.
      step: bytes of a chunk.

    Attributes:
      asked: the request; its ``resume`` is the place whose bytes are computed next.
        That is never in the middle of a window at first: a digest is of all of it.
      ended: whether all that was asked has been computed.
    """

    def __init__(self, request: service_pb2.StreamShardsRequest, step: int):
        self.asked = service_pb2.StreamShardsRequest()
        self.asked.CopyFrom(request)
        self.asked.resume.offset = 0
        self.ended = False
        self._begin = (request.resume.window, request.resume.offset)
        self._step = step
        self._parts: list[Iterator[Message | None]] = []
        self._digest = xxhash.xxh3_128()
        self._fault: SpecError | None = None

    def take(self, piece: Piece) -> None:
        """Makes messages of bytes that come next, which are copied."""
        header, data, times = piece
        window, skip = self._begin
        skip = skip if header.window == window else 0  # bytes that the caller has
        if skip > header.size:
            text = f"window {header.window}, byte {skip}: there is none"
            self._fault = SpecError("windows", [("resume", text)])
        if times > 1:
            made = _repeated(header, bytes(data), skip, self._step)
        else:
            made = iter(self._cut(header, data, skip))
        self._parts.append(made)
        done = header.offset + len(data) * times
        place = self.asked.resume
        if done < header.size:
            place.window, place.offset = header.window, done
            return
        place.window, place.offset = header.window + 1, 0
        self.ended = place.window == len(self.asked.windows)

    def messages(self) -> Iterator[Message | None]:
        """The messages of what was taken since the last time, made when they are sent.

        None stands for a chunk that the caller has already: nothing is sent, and others
        may have their turn.

        Raises:
          SpecError: the stream was to begin where there is nothing.
        """
        if self._fault is not None:
            raise self._fault
        made, self._parts = self._parts, []
        return chain.from_iterable(made)

    def _cut(
        self, piece: service_pb2.ShardHeader, data: memoryview, skip: int
    ) -> list[Message | None]:
        """The messages of a piece, all at once: its memory is soon another's."""
        made: list[Message | None] = []
        if piece.offset == 0:
            self._digest.reset()
            made.append(_header(piece, skip))
        self._digest.update(data)
        for first in range(max(skip - piece.offset, 0), len(data), self._step):
            chunk = data[first : first + self._step]
            made.append(frames.write(piece.offset + first, chunk))
        if piece.offset + len(data) == piece.size:
            made.append(_end(self._digest))
        return made


def _repeated(
    piece: service_pb2.ShardHeader, element: bytes, skip: int, step: int
) -> Iterator[Message | None]:
    """The messages of a whole window in which one element comes again and again."""
    digest = xxhash.xxh3_128()
    yield _header(piece, skip)
    for first in range(0, skip, step):  # seen by the caller, and by the digest
        digest.update(_run(element, first, min(step, skip - first))[0])
        yield None
    for first in range(skip, piece.size, step):
        data, crc32c = _run(element, first, min(step, piece.size - first))
        digest.update(data)
        yield frames.write(first, data, crc32c)
    yield _end(digest)


def _run(element: bytes, first: int, count: int) -> tuple[memoryview, int]:
    """A chunk of an element that comes again and again, and its CRC-32C."""
    return _made(element, first % len(element), count)


@lru_cache(maxsize=8)
def _made(element: bytes, phase: int, count: int) -> tuple[memoryview, int]:
    buffer = element * (count // len(element) + 2)
    data = memoryview(buffer)[phase : phase + count]
    return data, frames.checksum(data)


def _header(
    piece: service_pb2.ShardHeader, skip: int
) -> service_pb2.StreamShardsResponse:
    header = service_pb2.ShardHeader()
    header.CopyFrom(piece)
    header.offset = skip
    return service_pb2.StreamShardsResponse(header=header)


def _end(digest: xxhash.xxh3_128) -> service_pb2.StreamShardsResponse:
    end = service_pb2.ShardEnd(xxh3_128=digest.digest())
    return service_pb2.StreamShardsResponse(end=end)
