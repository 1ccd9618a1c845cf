"""Client: a training job asks for a model's initial weights by spec.

What comes over the network is the init program, a few hundred kilobytes; the weights
are made on the job's own devices, as if the model's code were here. Importing this
module imports neither JAX nor Flax: a process that only asks needs neither.

    with shardinit.connect("localhost:50051") as client:
        params = client.init(spec, key, mesh=mesh, rules=rules)
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from types import TracebackType
from typing import TYPE_CHECKING, Any

import grpc

from shardinit.errors import ServiceError
from shardinit.service import wire
from shardinit.service.limits import Limits
from shardinit.service.service_pb2_grpc import InitServiceStub
from shardinit.service.status import REQUEST_ID, from_rpc_error
from shardinit.service.store import Store, digest_of
from shardinit.v1 import service_pb2, spec_pb2

if TYPE_CHECKING:
    from shardinit.core.program import InitProgram

_VERSIONS = (1, 1)  # of the protocol: oldest and newest that this client speaks

_SERVICE_CONFIG = {
    "methodConfig": [
        {
            "name": [{"service": "shardinit.v1.InitService"}],
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.1s",
                "maxBackoff": "2s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ]
}


def connect(
    target: str,
    *,
    timeout: float = 120.0,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Client:
    """A client of the service at ``target``; the first call connects.

    Args:
      target: ``host:port``, or any target that gRPC resolves.
      timeout: seconds that each call may take, building the program included.
      cache_dir: folder for programs; None for the user's cache folder.

    Raises:
      ServiceError: the folder cannot be written.
    """
    return Client(target, timeout=timeout, cache_dir=cache_dir)


class Client:
    """Calls of one service; made by `connect`, also a context manager.

    Safe to use from several threads. Every failure is a `ServiceError` with the code's
    name in ``code``; faults of a spec are a `SpecError`.
    """

    def __init__(
        self,
        target: str,
        *,
        timeout: float = 120.0,
        cache_dir: str | os.PathLike[str] | None = None,
    ):
        self.target = target
        self._timeout = timeout
        self._limits = Limits()
        self._store = Store(cache_dir)
        self._lock = threading.Lock()
        self._version: service_pb2.GetVersionResponse | None = None
        self._closed = False
        self._channel = grpc.insecure_channel(
            target,
            options=(
                ("grpc.enable_retries", 1),
                ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
                ("grpc.max_receive_message_length", self._limits.response_bytes),
                ("grpc.max_send_message_length", self._limits.request_bytes),
            ),
        )
        self._stub = InitServiceStub(self._channel)

    def models(self) -> dict[str, dict[str, Any]]:
        """The models that the operator installed: config schema by name.

        Raises:
          ServiceError: the call failed.
        """
        request = service_pb2.ListModelsRequest()
        response = self._call("ListModels", request)
        return {m.name: wire.struct_to_dict(m.config_schema) for m in response.models}

    def describe(
        self, spec: Any, mesh: Any = None, rules: Any = None
    ) -> wire.Description:
        """The leaves of a model, their bytes, and with a mesh where they lie.

        Args:
          spec: a `ModelSpec`, or the sha256 of a program that the service holds.
          mesh: a ``Mesh``, an ``AbstractMesh``, or a mapping of axis name to size.
          rules: ``AxisRules``, ``PathRules`` or ``fsdp(...)``.

        Raises:
          SpecError: the spec, the mesh or the rules have faults.
          ServiceError: the call failed.
        """
        request = service_pb2.DescribeModelRequest(spec=wire.spec_to_proto(spec))
        if mesh is not None:
            request.mesh.CopyFrom(wire.mesh_to_proto(mesh))
        if rules is not None:
            request.rules.CopyFrom(wire.rules_to_proto(rules))
        response = self._call("DescribeModel", request)
        return wire.description_from_proto(response, placed=mesh is not None)

    def program(self, spec: Any) -> InitProgram:
        """The init program of a model, from the cache if it is there and current.

        Args:
          spec: a `ModelSpec`, or the sha256 of a program in hex.

        Raises:
          SpecError: the spec has faults.
          ServiceError: the call failed, or what came is damaged.
          ProgramFormatError: this version cannot run the program.
        """
        data = self._program_bytes(spec)
        from shardinit.core.program import InitProgram

        return InitProgram.from_bytes(data)

    def init(
        self,
        spec: Any,
        key: Any,
        *,
        mesh: Any = None,
        rules: Any = None,
        out_shardings: Any = None,
        select: Any = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Any:
        """Initialises a model by spec, every device making its own shard.

        Args:
          spec: a `ModelSpec`, or the sha256 of a program in hex.
          key: a JAX key or an int seed.
          mesh: the mesh of devices; None for one device.
          rules: ``AxisRules``, ``PathRules`` or ``fsdp(...)``.
          out_shardings: a pytree of shardings instead of rules.
          select: globs over leaf paths: the leaves to initialise.
          progress: called with (leaves dispatched, leaves in all).

        Returns:
          dicts, lists and tuples of arrays, sharded.

        Raises:
          SpecError: the spec has faults.
          ServiceError: the program could not be fetched.
          ShardingError: the rules do not fit the leaves.
        """
        program = self.program(spec)
        from shardinit.core.compiled import init

        return init(
            program,
            key,
            mesh=mesh,
            rules=rules,
            out_shardings=out_shardings,
            select=select,
            progress=progress,
        )

    def close(self) -> None:
        """Closes the connection; a second time does nothing."""
        self._closed = True
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _program_bytes(self, spec: Any) -> bytes:
        message = wire.spec_to_proto(spec)
        text = message.SerializeToString(deterministic=True)
        name = hashlib.sha256(text).hexdigest()
        digest = message.program_sha256.hex() or self._store.remembered(name)
        held = self._store.read(digest) if digest else None
        if held is not None and message.program_sha256:
            return held  # its digest is its name: nothing to ask
        known = bytes.fromhex(digest) if digest and held is not None else b""
        for last in (False, False, True):
            try:
                data, digest = self._fetch(message, known, held)
                break
            except ServiceError as error:
                # gRPC never resumes a stream that has begun; a program is small, so
                # the whole of it is asked for again.
                if last or error.code not in ("UNAVAILABLE", "DATA_LOSS"):
                    raise
        else:
            raise AssertionError("the last attempt returns or raises")
        if data is not held:
            self._store.write(digest, data)
            self._store.remember(name, digest)
        return data

    def _fetch(
        self, spec: spec_pb2.ModelSpec, known: bytes, held: bytes | None
    ) -> tuple[bytes, str]:
        """The program's bytes, checked, and its digest."""
        request = service_pb2.GetProgramRequest(
            spec=spec, jax_version=_jax_version(), known_sha256=known
        )
        self._negotiate()
        with self._translated("GetProgram"):
            stream = self._stub.GetProgram(
                request, timeout=self._timeout, metadata=_metadata()
            )
            try:
                return self._assemble(stream, known, held)
            finally:
                stream.cancel()  # does nothing to a stream that has ended

    def _assemble(
        self, stream: Any, known: bytes, held: bytes | None
    ) -> tuple[bytes, str]:
        first = next(stream, None)
        if first is None or first.WhichOneof("part") != "header":
            raise self._damaged("the stream has no header")
        header = first.header
        if header.size > self._limits.program_bytes or len(header.sha256) != 32:
            raise self._damaged(f"a header of {header.size:,} bytes")
        digest = header.sha256.hex()
        if held is not None and header.sha256 == known:
            return held, digest
        buffer = bytearray(header.size)
        filled = 0
        for message in stream:
            data = message.chunk.data
            end = filled + len(data)
            if message.chunk.offset != filled or not data or end > header.size:
                raise self._damaged(f"a chunk does not follow at byte {filled:,}")
            buffer[filled:end] = data
            filled = end
        if filled != header.size:
            raise self._damaged(f"{filled:,} of {header.size:,} bytes came")
        result = bytes(buffer)
        if digest_of(result) != digest:
            raise self._damaged("the sha256 differs from the header's")
        return result, digest

    def _damaged(self, came: str) -> ServiceError:
        where = f"GetProgram from {self.target}"
        return ServiceError(where, came, "an undamaged program", code="DATA_LOSS")

    def _negotiate(self) -> None:
        """Agrees on the protocol's version, once."""
        if self._closed:
            raise ServiceError(self.target, "the client is closed", code="CANCELLED")
        with self._lock:
            if self._version is not None:
                return
            oldest, newest = _VERSIONS
            request = service_pb2.GetVersionRequest(min=oldest, max=newest)
            with self._translated("GetVersion"):
                self._version = self._stub.GetVersion(
                    request, timeout=self._timeout, metadata=_metadata()
                )

    def _call(self, name: str, request: Any) -> Any:
        self._negotiate()
        with self._translated(name):
            call = getattr(self._stub, name)
            return call(request, timeout=self._timeout, metadata=_metadata())

    @contextmanager
    def _translated(self, name: str) -> Iterator[None]:
        try:
            yield
        except grpc.RpcError as error:
            raise from_rpc_error(error, f"{name} from {self.target}") from error


def _metadata() -> tuple[tuple[str, str], ...]:
    return ((REQUEST_ID, uuid.uuid4().hex),)


def _jax_version() -> str:
    """Version of the installed JAX, without importing it; empty if there is none."""
    try:
        return metadata.version("jax")
    except metadata.PackageNotFoundError:
        return ""
