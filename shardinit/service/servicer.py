"""Servicer: the four calls of the init service.

Each is short: hold the request against the limits, read it, let the core do its work
once for all who ask the same, and write the answer. No parameter is allocated
here; a model is traced, cut and exported, which costs memory in the size of its
programs and not of its weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import grpc

import shardinit
from shardinit.errors import ServiceError, SpecError
from shardinit.service import wire
from shardinit.service.boundary import remaining
from shardinit.service.cache import BuildCache
from shardinit.service.limits import Limits
from shardinit.service.service_pb2_grpc import InitServiceServicer
from shardinit.v1 import service_pb2

VERSION = 1


@dataclass(frozen=True)
class Built:
    """An init program, ready to be sent.

    Attributes:
      data: the serialised program.
      sha256: its digest, 32 bytes.
      fingerprint: of the init function, in hex.
      jax_version: of the JAX that made it.
    """

    data: bytes
    sha256: bytes
    fingerprint: str
    jax_version: str


class Servicer(InitServiceServicer):
    """Answers from registered models, within limits.

    Args:
      limits: caps on requests.
      cache_bytes: bound on what is kept of programs, and again of descriptions.
    """

    def __init__(self, limits: Limits | None = None, cache_bytes: int = 256 << 20):
        self._limits = limits or Limits()
        self._programs: BuildCache[Built] = BuildCache(
            cache_bytes, lambda built: len(built.data)
        )
        self._described: BuildCache[service_pb2.DescribeModelResponse] = BuildCache(
            cache_bytes, lambda message: message.ByteSize()
        )

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
        return self._described.get(
            key, lambda: self._describe(spec, request), remaining(context)
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
        if version:
            _check_jax(version, _jax_version())  # before a build that helps nobody
        built = self._program(wire.spec_from_proto(request.spec), remaining(context))
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
        step = self._limits.chunk_bytes
        for start in range(0, len(built.data), step):
            chunk = service_pb2.ProgramChunk(
                offset=start, data=built.data[start : start + step]
            )
            yield service_pb2.GetProgramResponse(chunk=chunk)

    def _describe(
        self, spec: Any, request: service_pb2.DescribeModelRequest
    ) -> service_pb2.DescribeModelResponse:
        mesh = wire.mesh_from_proto(request.mesh) if request.HasField("mesh") else None
        rules = None
        if request.HasField("rules"):
            rules = wire.rules_from_proto(request.rules)
        if isinstance(spec, str):
            held = self._held(spec)
            made: Any = shardinit.InitProgram.from_bytes(held.data)
        else:
            made = _build(spec)
        plan = shardinit.plan(made, mesh=mesh, rules=rules)
        name = "program" if isinstance(spec, str) else spec.model
        self._limits.check_leaves(name, (leaf.shape for leaf in plan.leaves))
        response = wire.plan_to_proto(plan)
        if response.ByteSize() > self._limits.response_bytes:
            raise ServiceError(
                "DescribeModel",
                f"the answer has {response.ByteSize():,} bytes",
                f"at most {self._limits.response_bytes:,}",
                "Ask for the program and plan it in the client",
                code="RESOURCE_EXHAUSTED",
            )
        return response

    def _program(self, spec: Any, timeout: float | None) -> Built:
        if isinstance(spec, str):
            return self._held(spec)
        built = self._programs.get(
            spec.fingerprint, lambda: self._export(spec), timeout
        )
        self._programs.get(built.sha256.hex(), lambda: built)
        return built

    def _held(self, digest: str) -> Built:
        found = self._programs.find(digest)
        if found is None:
            raise ServiceError(
                "program_sha256",
                f"no program {digest[:16]}… is held here",
                remedy="Ask by model and config",
                code="NOT_FOUND",
            )
        return found

    def _export(self, spec: Any) -> Built:
        plan = shardinit.plan(_build(spec))
        self._limits.check_leaves(spec.model, (leaf.shape for leaf in plan.leaves))
        program = shardinit.export_plan(plan)
        data = program.to_bytes()
        if len(data) > self._limits.program_bytes:
            raise ServiceError(
                "GetProgram",
                f"the program has {len(data):,} bytes",
                f"at most {self._limits.program_bytes:,}",
                "Do not capture arrays in the init function",
                code="RESOURCE_EXHAUSTED",
            )
        digest = bytes.fromhex(program.sha256)
        return Built(data, digest, program.fingerprint, program.jax_version)


def _build(spec: Any) -> Any:
    from shardinit.models import build

    return build(spec)


def _refuse(spec: Any, faults: list[tuple[str, str]]) -> None:
    if faults:
        model = spec.named.model if spec.WhichOneof("spec") == "named" else "program"
        raise SpecError(model[:128], faults)


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
            f"Install jax>={producer} in the client, or serve with an older JAX",
            code="FAILED_PRECONDITION",
        )
