"""Outgoing: a stream of windows as the process that listens sends it.

It knows where the stream is and the digest of what it has seen of the window there, so
that any worker can compute the bytes that come next. The bytes are copied once, from
the memory that a worker shares with this process into the message that carries them.
"""

from __future__ import annotations

import xxhash

from shardinit.errors import SpecError
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
        self._messages: list[Message] = []
        self._digest = xxhash.xxh3_128()
        self._fault: SpecError | None = None

    def take(self, piece: service_pb2.ShardHeader, data: memoryview) -> None:
        """Makes messages of bytes that come next, which are copied."""
        window, skip = self._begin
        skip = skip if piece.window == window else 0  # bytes that the caller has
        if piece.offset == 0:
            self._begin_window(piece, skip)
        self._digest.update(data)
        for first in range(max(skip - piece.offset, 0), len(data), self._step):
            chunk = data[first : first + self._step]
            self._messages.append(frames.write(piece.offset + first, chunk))
        done = piece.offset + len(data)
        place = self.asked.resume
        if done < piece.size:
            place.window, place.offset = piece.window, done
            return
        end = service_pb2.ShardEnd(xxh3_128=self._digest.digest())
        self._messages.append(service_pb2.StreamShardsResponse(end=end))
        place.window, place.offset = piece.window + 1, 0
        self.ended = place.window == len(self.asked.windows)

    def messages(self) -> list[Message]:
        """The messages of what was taken since the last time.

        Raises:
          SpecError: the stream was to begin where there is nothing.
        """
        if self._fault is not None:
            raise self._fault
        made, self._messages = self._messages, []
        return made

    def _begin_window(self, piece: service_pb2.ShardHeader, skip: int) -> None:
        if skip > piece.size:
            text = f"window {piece.window}, byte {skip}: there is none"
            self._fault = SpecError("windows", [("resume", text)])
        self._digest.reset()
        header = service_pb2.ShardHeader()
        header.CopyFrom(piece)
        header.offset = skip
        self._messages.append(service_pb2.StreamShardsResponse(header=header))
