"""Servicer: the calls of the init service.

Each is short: hold the request against the limits, read it, let the core do its work
once for all who ask the same, and write the answer. A model is traced, cut and
exported, which costs memory in the size of its programs and not of its weights; the
bytes of weights are computed as they are sent, a block at a time.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc

import shardinit
from shardinit.errors import ServiceError, SpecError
from shardinit.service import description, streams, wire
from shardinit.service.boundary import remaining
from shardinit.service.cache import BuildCache
from shardinit.service.checkpoints import Checkpoints
from shardinit.service.config import Config
from shardinit.service.service_pb2_grpc import InitServiceServicer
from shardinit.service.sources import Sources
from shardinit.service.telemetry import Metrics
from shardinit.v1 import service_pb2

VERSION = 1


class Servicer(InitServiceServicer):
    """Answers from registered models, within limits.

    Args:
      config: how to serve.
      metrics: where bytes are counted.
    """

    def __init__(self, config: Config | None = None, metrics: Metrics | None = None):
        self._config = config or Config()
        self._limits = self._config.limits
        self._metrics = metrics or Metrics()
        self._draining = threading.Event()
        self._ahead = ThreadPoolExecutor(self._config.streams, "shardinit-ahead")
        self._sources = Sources(self._limits, self._config.cache_bytes)
        self._described: BuildCache[service_pb2.DescribeModelResponse] = BuildCache(
            self._config.cache_bytes, lambda message: message.ByteSize()
        )
        self._checkpoints = Checkpoints(self._config, self._sources)
        self._metrics.watch(
            "cache_bytes",
            "Bytes of plans, programs and descriptions that are kept",
            lambda: self._sources.bytes + self._described.bytes,
        )

    def hand_back(self) -> None:
        """Ends running streams and writes, so that clients go on elsewhere."""
        self._draining.set()
        self._checkpoints.stop()

    def GetVersion(
        self, request: service_pb2.GetVersionRequest, context: grpc.ServicerContext
    ) -> service_pb2.GetVersionResponse:
        """The newest protocol version that both sides speak."""
        if not 1 <= request.min <= request.max:
            text = f"{request.min} to {request.max} is no range of versions"
            raise SpecError("request", [("min", text)])
        if not request.min <= VERSION <= request.max:
            raise ServiceError(
                "protocol version",
                f"the client speaks {request.min} to {request.max}",
                f"{VERSION}",
                "Use a client and a server of the same release",
                code="FAILED_PRECONDITION",
            )
        return service_pb2.GetVersionResponse(
            version=VERSION,
            server_version=shardinit.__version__,
            jax_version=_jax_version(),
        )

    def ListModels(
        self, request: service_pb2.ListModelsRequest, context: grpc.ServicerContext
    ) -> service_pb2.ListModelsResponse:
        """All registered models; one that cannot be imported is listed bare."""
        from shardinit.models import builder, model_names

        response = service_pb2.ListModelsResponse()
        for name in model_names():
            info = response.models.add(name=name)
            try:
                schema = builder(name).schema
            except ImportError:
                continue  # the other models are still there to be used
            info.config_schema.update(dict(schema))
        return response

    def DescribeModel(
        self, request: service_pb2.DescribeModelRequest, context: grpc.ServicerContext
    ) -> service_pb2.DescribeModelResponse:
        """The leaves of a model and where they lie."""
        faults = self._limits.check_spec(request.spec)
        if request.HasField("mesh"):
            faults += self._limits.check_mesh(request.mesh)
        if request.HasField("rules"):
            faults += self._limits.check_rules(request.rules)
            if not request.HasField("mesh"):
                faults.append(("rules", "given without a mesh"))
        _refuse(request.spec, faults)
        spec = wire.spec_from_proto(request.spec)
        key = (
            spec if isinstance(spec, str) else spec.fingerprint,
            request.mesh.SerializeToString(deterministic=True),
            request.rules.SerializeToString(deterministic=True),
        )
        timeout = remaining(context)
        return self._described.get(
            key, lambda: self._describe(spec, request, timeout), timeout
        )

    def GetProgram(
        self, request: service_pb2.GetProgramRequest, context: grpc.ServicerContext
    ) -> Iterator[service_pb2.GetProgramResponse]:
        """A header, then the program's bytes."""
        faults = self._limits.check_spec(request.spec)
        version = request.jax_version
        if version and not _numbers(version):
            text = f"{version[:32]!r} is no version of JAX"
            faults.append(("jax_version", text))
        if len(request.known_sha256) not in (0, 32):
            text = f"{len(request.known_sha256)} bytes; a SHA-256 has 32"
            faults.append(("known_sha256", text))
        _refuse(request.spec, faults)
        spec = wire.spec_from_proto(request.spec)
        if version and not isinstance(spec, str):
            _check_jax(version, _jax_version())  # before a build that helps nobody
        built = self._sources.program(spec, remaining(context))
        if version:
            _check_jax(version, built.jax_version)
        header = service_pb2.ProgramHeader(
            size=len(built.data),
            sha256=built.sha256,
            fingerprint=built.fingerprint,
            jax_version=built.jax_version,
        )
        yield service_pb2.GetProgramResponse(header=header)
        if request.known_sha256 == built.sha256:
            return
        for chunk in wire.chunks_to_proto(built.data, self._limits.chunk_bytes):
            yield service_pb2.GetProgramResponse(chunk=chunk)

    def StreamShards(
        self, request: service_pb2.StreamShardsRequest, context: grpc.ServicerContext
    ) -> Iterator[Any]:
        """The bytes of windows, block by block."""
        faults = self._limits.check_spec(request.spec)
        faults += self._limits.check_key(request.key)
        faults += self._limits.check_windows(request.windows)
        _refuse(request.spec, faults)
        plan = self._sources.plan(
            wire.spec_from_proto(request.spec), remaining(context)
        )
        try:
            tree = shardinit.open(
                plan,
                wire.key_from_proto(request.key),
                memory_limit=self._config.whole_bytes,
            )
        except TypeError as error:  # a key of another kind than the model's
            raise SpecError("key", [("key", str(error))]) from error
        windows = streams.read_windows(request, tree)
        sent = self._metrics.sent
        for message in streams.send(
            windows,
            request.resume,
            self._limits,
            self._config.block_bytes,
            self._ahead,
            self._alive,
        ):
            yield message
            if isinstance(message, bytes):
                sent.inc(len(message))

    def WriteCheckpoint(
        self, request: service_pb2.WriteCheckpointRequest, context: grpc.ServicerContext
    ) -> Iterator[service_pb2.WriteCheckpointResponse]:
        """Progress, then the receipt."""
        faults = self._limits.check_spec(request.spec)
        faults += self._limits.check_key(request.key)
        _refuse(request.spec, faults)
        yield from self._checkpoints.write(request, context)

    def UploadProgram(
        self,
        request_iterator: Iterator[service_pb2.UploadProgramRequest],
        context: grpc.ServicerContext,
    ) -> service_pb2.UploadProgramResponse:
        """Keeps a client's program under its digest."""
        if not self._config.allow_upload:
            raise ServiceError(
                "UploadProgram",
                "the operator does not allow it",
                remedy="Ask by model and config, or serve with --allow-upload",
                code="UNIMPLEMENTED",
            )
        header = self._upload_header(next(request_iterator, None))
        built = self._sources.find(header.sha256.hex())
        if built is None:
            chunks = (_chunk(message) for message in request_iterator)
            try:
                data = wire.chunks_from_proto(chunks, header.size)
            except ValueError as error:
                raise SpecError("program", [("chunk", str(error))]) from error
            built = self._sources.add(data)
        if built.sha256 != header.sha256:
            text = f"announced as {header.sha256.hex()}, it is {built.sha256.hex()}"
            raise SpecError("program", [("header.sha256", text)])
        return service_pb2.UploadProgramResponse(
            sha256=built.sha256, fingerprint=built.fingerprint
        )

    def _upload_header(self, first: Any) -> service_pb2.UploadHeader:
        first = _parsed(first)
        if first is None or first.WhichOneof("part") != "header":
            raise SpecError("program", [("header", "missing; it comes first")])
        header = first.header
        faults = []
        if not 0 < header.size <= self._limits.program_bytes:
            text = f"{header.size} bytes; at most {self._limits.program_bytes}"
            faults.append(("header.size", text))
        if len(header.sha256) != 32:
            text = f"{len(header.sha256)} bytes; a SHA-256 has 32"
            faults.append(("header.sha256", text))
        if faults:
            raise SpecError("program", faults)
        return header

    def _alive(self) -> None:
        if self._draining.is_set():
            raise ServiceError(
                "StreamShards",
                "the server is stopping",
                remedy="Go on with another replica from where the stream ended",
                code="UNAVAILABLE",
            )

    def _describe(
        self,
        spec: Any,
        request: service_pb2.DescribeModelRequest,
        timeout: float | None,
    ) -> service_pb2.DescribeModelResponse:
        mesh = wire.mesh_from_proto(request.mesh) if request.HasField("mesh") else None
        rules = None
        if request.HasField("rules"):
            rules = wire.rules_from_proto(request.rules)
        plan = self._sources.placed(spec, mesh, rules, timeout)
        response = description.plan_to_proto(plan)
        if response.ByteSize() > self._limits.response_bytes:
            raise ServiceError(
                "DescribeModel",
                f"the answer has {response.ByteSize():,} bytes",
                f"at most {self._limits.response_bytes:,}",
                "Ask for the program and plan it in the client",
                code="RESOURCE_EXHAUSTED",
            )
        return response


def _refuse(spec: Any, faults: list[tuple[str, str]]) -> None:
    if faults:
        model = spec.named.model if spec.WhichOneof("spec") == "named" else "program"
        raise SpecError(model[:128], faults)


def _parsed(message: Any) -> Any:
    """A message of a caller's stream; one that did not parse is raised."""
    if isinstance(message, Exception):
        raise message
    return message


def _chunk(message: Any) -> service_pb2.ProgramChunk:
    if _parsed(message).WhichOneof("part") != "chunk":
        raise SpecError("program", [("chunk", "another header inside the stream")])
    return message.chunk


def _jax_version() -> str:
    import jax

    return jax.__version__


def _numbers(version: str) -> tuple[int, ...]:
    """The first three numbers of a version; empty if it is none."""
    match = re.match(r"(\d{1,6})\.(\d{1,6})(?:\.(\d{1,6}))?", version)
    if match is None or len(version) > 64:
        return ()
    return tuple(int(part or 0) for part in match.groups())


def _check_jax(client: str, producer: str) -> None:
    if _numbers(client) < _numbers(producer):
        raise ServiceError(
            "JAX version",
            f"the client has {client}, the program is made by {producer}",
            "a client's JAX that is not older than the program's",
            f"Install jax>={producer} in the client, ask for the bytes instead "
            f'(via="stream"), or serve with an older JAX',
            code="FAILED_PRECONDITION",
        )
