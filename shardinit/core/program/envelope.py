"""The envelope of a program file: its content, compressed, under its digest.

No JAX is needed to open it, so a client's store can check what it keeps.
"""

from __future__ import annotations

import hashlib
import zlib

from shardinit.errors import ProgramFormatError
from shardinit.v1 import program_pb2 as pb

MAX_CONTENT_BYTES = 1 << 30


def content_of(envelope: pb.InitProgram) -> bytes:
    """The content, decompressed to no more than was announced and is allowed.

    Raises:
      ProgramFormatError: it does not decompress, or is not what its digest says.
    """
    size = envelope.content_size
    if envelope.compression != pb.COMPRESSION_ZLIB or size > MAX_CONTENT_BYTES:
        raise ProgramFormatError(
            "init program",
            f"a content of {size:,} bytes, compression {envelope.compression}",
            f"at most {MAX_CONTENT_BYTES:,} bytes, compressed with zlib",
        )
    unpacker = zlib.decompressobj()
    try:
        # One byte more than announced shows a content that is longer.
        content = unpacker.decompress(envelope.content, size + 1)
    except zlib.error as error:
        raise ProgramFormatError(
            "init program", f"its content does not decompress ({error})"
        ) from error
    if len(content) != size or unpacker.unused_data:
        raise ProgramFormatError(
            "init program",
            f"its content has {len(content):,} bytes or more",
            f"the {size:,} that are announced",
        )
    if hashlib.sha256(content).digest() != envelope.sha256:
        raise ProgramFormatError(
            "init program",
            "its content does not match its SHA-256: it is damaged or cut short",
            remedy="Fetch or export it again",
        )
    return content
