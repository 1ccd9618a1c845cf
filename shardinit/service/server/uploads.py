"""Uploads: a client's own program, from the first message of its stream to the cache.

A program is named by its digest, so one that is held already need not be sent again,
and nobody can put another one in its place. What is announced is decided upon before
anything is taken in, and no more is taken in than was announced.
"""

from __future__ import annotations

from collections.abc import Iterator

from shardinit.errors import ServiceError, SpecError
from shardinit.service.server.config import Config
from shardinit.service.server.model_cache import ModelCache
from shardinit.service.wire import messages as wire
from shardinit.v1 import service_pb2


def take(
    messages: Iterator[service_pb2.UploadProgramRequest],
    models: ModelCache,
    config: Config,
) -> service_pb2.UploadProgramResponse:
    """Keeps a program under its digest.

    Raises:
      SpecError: the stream or the program has faults.
      ServiceError: the operator does not allow it, or keeps no program of that size.
    """
    if not config.allow_upload:
        raise ServiceError(
            "UploadProgram",
            "the operator does not allow it",
            remedy="Ask by model and config, or serve with --allow-upload",
            code="UNIMPLEMENTED",
        )
    first = next(messages, None)
    if first is None or not first.HasField("header"):
        raise SpecError("program", [("header", "missing; it comes first")])
    header = first.header
    if header.size > config.cache_bytes:
        raise ServiceError(
            "UploadProgram",
            f"a program of {header.size:,} bytes would not be kept",
            f"at most {config.cache_bytes:,}",
            "Serve with a larger --cache-bytes",
            code="RESOURCE_EXHAUSTED",
        )
    built = models.held(header.sha256)
    if built is None:
        try:
            data = wire.chunks_from_proto(map(_chunk, messages), header.size)
        except ValueError as error:
            raise SpecError("program", [("chunk", str(error))]) from error
        built = models.add(data)
    if built.sha256 != header.sha256:
        text = f"announced as {header.sha256.hex()}, it is {built.sha256.hex()}"
        raise SpecError("program", [("header.sha256", text)])
    return service_pb2.UploadProgramResponse(
        sha256=built.sha256, fingerprint=built.fingerprint
    )


def _chunk(message: service_pb2.UploadProgramRequest) -> service_pb2.ProgramChunk:
    if not message.HasField("chunk"):
        raise SpecError("program", [("chunk", "another header inside the stream")])
    return message.chunk
