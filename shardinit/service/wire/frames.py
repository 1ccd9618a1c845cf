"""Frames: the chunks of a stream, put together and taken apart without copying.

A chunk is a lot of data with a few bytes in front. A protobuf library copies the data
into its message and out again, on both sides; here the few bytes are written and read
by hand. Whatever does not look exactly like that goes through protobuf.
"""

from __future__ import annotations

from typing import NamedTuple

from crc32c import crc32c as checksum

from shardinit.v1 import service_pb2

_CHUNK = 0x12  # field 2 of StreamShardsResponse, a message
_OFFSET, _CRC32C, _DATA = 0x08, 0x15, 0x1A  # fields of ShardChunk


class Chunk(NamedTuple):
    """Bytes of a window.

    Attributes:
      offset: where they start, in bytes from the beginning of the window.
      crc32c: their CRC-32C, as the sender computed it.
      data: the bytes.
    """

    offset: int
    crc32c: int
    data: bytes | memoryview


def write(offset: int, data: memoryview, crc32c: int | None = None) -> bytes:
    """A ``StreamShardsResponse`` with one chunk, serialised.

    Args:
      offset: where its bytes begin in the window.
      data: its bytes.
      crc32c: of them, where that is known.
    """
    crc32c = checksum(data) if crc32c is None else crc32c
    head = service_pb2.ShardChunk(offset=offset, crc32c=crc32c).SerializeToString()
    inner = head + bytes((_DATA,)) + _varint(len(data))
    outer = bytes((_CHUNK,)) + _varint(len(inner) + len(data))
    return b"".join((outer, inner, data))


def read(message: bytes) -> Chunk | service_pb2.StreamShardsResponse:
    """A serialised ``StreamShardsResponse``; of a chunk, its data as a view.

    Raises:
      google.protobuf.message.DecodeError: it is none.
    """
    chunk = _fast(message)
    if chunk is not None:
        return chunk
    parsed = service_pb2.StreamShardsResponse.FromString(message)
    if parsed.WhichOneof("part") == "chunk":
        slow = parsed.chunk
        return Chunk(slow.offset, slow.crc32c, slow.data)
    return parsed


def _fast(message: bytes) -> Chunk | None:
    """A chunk whose fields stand in order, each once; None for anything else."""
    try:
        if message[0] != _CHUNK:
            return None
        length, at = _read_varint(message, 1)
        if at + length != len(message):
            return None
        # protobuf leaves out a field that is 0, as the first chunk's offset is.
        offset = crc32c = 0
        if message[at] == _OFFSET:
            offset, at = _read_varint(message, at + 1)
        if message[at] == _CRC32C:
            crc32c = int.from_bytes(message[at + 1 : at + 5], "little")
            at += 5
        if message[at] != _DATA:
            return None
        length, at = _read_varint(message, at + 1)
    except IndexError:
        return None
    if at + length != len(message):
        return None
    return Chunk(offset, crc32c, memoryview(message)[at:])


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)


def _read_varint(message: bytes, at: int) -> tuple[int, int]:
    """A number of at most 64 bits and the place after it."""
    number = 0
    for shift in range(0, 64, 7):
        byte = message[at]
        at += 1
        number |= (byte & 127) << shift
        if byte < 128 and number < 1 << 64:
            return number, at
    raise IndexError
