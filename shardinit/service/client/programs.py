"""Programs: init programs from a service, each fetched once.

The store on disk is asked first; the service then says in one header whether what is
held is still what the spec means. A program is small, so a stream that breaks is asked
for again from its beginning, and nothing that is damaged gets past the digest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from shardinit.errors import ServiceError
from shardinit.service.client.connection import Connection
from shardinit.service.client.disk import Store, digest_of
from shardinit.service.client.retrying import attempts
from shardinit.service.wire import chunks
from shardinit.service.wire import messages as wire
from shardinit.service.wire.limits import DEFAULTS
from shardinit.service.wire.versions import jax_version
from shardinit.v1 import service_pb2, spec_pb2

if TYPE_CHECKING:
    from shardinit.service.wire.messages import Spec


class Programs:
    """Serialised programs by spec.

    Args:
      connection: to the service.
      store: where they are kept.
    """

    def __init__(self, connection: Connection, store: Store):
        self._connection = connection
        self._store = store

    def get(self, spec: Spec) -> bytes:
        """The program of a ``ModelSpec``, or of a sha256 in hex.

        Raises:
          SpecError: the spec has faults.
          ServiceError: the call failed, or what came is damaged.
        """
        message = wire.spec_to_proto(spec)
        # A config is a map, whose entries protobuf else writes in any order:
        # https://protobuf.dev/programming-guides/serialization-not-canonical/
        text = message.SerializeToString(deterministic=True)
        name = hashlib.sha256(text).hexdigest()
        digest = message.program_sha256.hex() or self._store.remembered(name)
        held = self._store.read(digest) if digest else None
        if held is not None and message.program_sha256:
            return held  # its digest is its name: nothing to ask
        known = bytes.fromhex(digest) if digest and held is not None else b""
        seconds = self._connection.timeout
        fetched = attempts(("UNAVAILABLE", "DATA_LOSS"), most=3, seconds=seconds)
        data, digest = fetched(self._fetch, message, known, held)
        if data is not held:
            self._store.write(digest, data)
            self._store.remember(name, digest)
        return data

    def upload(self, data: bytes, digest: str) -> None:
        """Registers a serialised program under its digest.

        Raises:
          ServiceError: the operator does not allow it, or the call failed.
        """
        header = service_pb2.UploadHeader(size=len(data), sha256=bytes.fromhex(digest))

        def messages() -> Iterator[service_pb2.UploadProgramRequest]:
            yield service_pb2.UploadProgramRequest(header=header)
            for chunk in chunks.cut(data, DEFAULTS.request_bytes // 2):
                yield service_pb2.UploadProgramRequest(chunk=chunk)

        self._connection.call("UploadProgram", messages)

    def _fetch(
        self, spec: spec_pb2.ModelSpec, known: bytes, held: bytes | None
    ) -> tuple[bytes, str]:
        """The program's bytes, checked, and its digest."""
        request = service_pb2.GetProgramRequest(
            spec=spec, jax_version=jax_version(), known_sha256=known
        )
        with self._connection.stream("GetProgram", request) as messages:
            first = next(messages, None)
            if first is None or first.WhichOneof("part") != "header":
                raise self._damaged("the stream has no header")
            header = first.header
            if header.size > DEFAULTS.program_bytes or len(header.sha256) != 32:
                raise self._damaged(f"a header of {header.size:,} bytes")
            digest = header.sha256.hex()
            if held is not None and header.sha256 == known:
                if next(messages, None) is not None:
                    raise self._damaged("bytes of a program that is held")
                return held, digest
            joined = chunks.Joined(header.size)
            try:
                for message in messages:
                    joined.add(message.chunk)
                result = joined.result()
            except ValueError as error:
                raise self._damaged(str(error)) from error
        if digest_of(result) != digest:
            raise self._damaged("the sha256 differs from the header's")
        return result, digest

    def _damaged(self, got: str) -> ServiceError:
        where = f"GetProgram from {self._connection.target}"
        return ServiceError(where, got, "an undamaged program", code="DATA_LOSS")
