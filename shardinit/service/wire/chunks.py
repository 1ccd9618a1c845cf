"""Chunks: a serialised program in pieces, and together again.

Neither side needs more than bytes for it, and the process that listens imports no JAX.
"""

from __future__ import annotations

from collections.abc import Iterator

from shardinit.v1 import service_pb2


def cut(data: bytes, step: int) -> Iterator[service_pb2.ProgramChunk]:
    """A serialised program in pieces of ``step`` bytes."""
    for start in range(0, len(data), step):
        piece = data[start : start + step]
        yield service_pb2.ProgramChunk(offset=start, data=piece)


class Joined:
    """The program that pieces make; never holds more than was announced.

    Args:
      size: bytes of the program.
    """

    def __init__(self, size: int):
        self._size = size
        self._buffer = bytearray()

    def add(self, chunk: service_pb2.ProgramChunk) -> None:
        """Takes the next piece.

        Raises:
          ValueError: it does not follow on those before it, or is too much.
        """
        if chunk.offset != len(self._buffer) or not chunk.data:
            raise ValueError(f"a chunk does not follow at byte {len(self._buffer):,}")
        if len(self._buffer) + len(chunk.data) > self._size:
            raise ValueError(f"more than the {self._size:,} bytes that were announced")
        self._buffer += chunk.data

    def result(self) -> bytes:
        """The program.

        Raises:
          ValueError: it is not complete.
        """
        if len(self._buffer) != self._size:
            raise ValueError(f"{len(self._buffer):,} of {self._size:,} bytes came")
        return bytes(self._buffer)
