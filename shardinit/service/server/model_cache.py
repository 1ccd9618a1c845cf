"""Model cache: a spec's plan and what is made of it, each once, kept while used.

A spec names a registered model or the digest of a program that is held here. Either way
what everything else needs is one thing, a plan without a mesh: to place it on a mesh
is quick, while tracing a model and exporting its functions takes seconds. So plans
and programs are kept by spec, and descriptions by spec, mesh and rules; a program is
also found by its digest.
"""

from __future__ import annotations

from dataclasses import dataclass

from shardinit.core.cut.sources import Constant
from shardinit.core.plan.plan import Plan
from shardinit.core.plan.plan import plan as make_plan
from shardinit.core.program.program import InitProgram, export_plan
from shardinit.errors import ProgramFormatError, ServiceError, SpecError
from shardinit.models import ModelSpec, build
from shardinit.service.server.cache import BuildCache
from shardinit.service.server.config import Config
from shardinit.service.wire import messages as wire
from shardinit.service.wire.description import plan_to_proto
from shardinit.v1 import service_pb2

_LEAF_BYTES = 4096  # what one leaf of a plan takes, about


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


class ModelCache:
    """Plans, programs and descriptions of specs.

    Args:
      config: caps on models and programs, and what may be kept of each kind.
    """

    def __init__(self, config: Config):
        self._limits = config.limits
        kept = config.cache_bytes
        self._plans: BuildCache[Plan] = BuildCache(kept, _plan_bytes)
        self._programs: BuildCache[Built] = BuildCache(kept, lambda x: len(x.data))
        self._described: BuildCache[service_pb2.DescribeModelResponse] = BuildCache(
            kept, lambda x: x.ByteSize()
        )

    @property
    def bytes(self) -> int:
        """Bytes that are kept."""
        return self._plans.bytes + self._programs.bytes + self._described.bytes

    def plan(self, spec: ModelSpec | str, timeout: float | None = None) -> Plan:
        """The plan of a spec without a mesh.

        Args:
          spec: a ``ModelSpec``, or the sha256 of a program that is held, in hex.
          timeout: seconds to wait for another one's build.

        Raises:
          SpecError: the spec has faults.
          ServiceError: the program is not held, or it takes too long.
        """
        return self._plans.get(_name(spec), lambda: self._trace(spec), timeout)

    def describe(
        self, request: service_pb2.DescribeModelRequest, timeout: float | None
    ) -> service_pb2.DescribeModelResponse:
        """What a spec consists of, and where it lies; errors as for `plan`.

        Raises:
          ShardingError: the rules do not fit the leaves.
        """
        spec = wire.spec_from_proto(request.spec)
        key = (
            _name(spec),
            request.mesh.SerializeToString(deterministic=True),
            request.rules.SerializeToString(deterministic=True),
        )
        return self._described.get(key, lambda: self._place(spec, request), timeout)

    def program(self, spec: ModelSpec | str, timeout: float | None = None) -> Built:
        """The program of a spec; arguments and errors as for `plan`."""
        if not isinstance(spec, str):
            return self._programs.get(_name(spec), lambda: self._export(spec), timeout)
        found = self.held(bytes.fromhex(spec))
        if found is None:
            raise ServiceError(
                "program_sha256",
                f"no program {spec[:16]}… is held here",
                remedy="Ask by model and config, or upload the program",
                code="NOT_FOUND",
            )
        return found

    def held(self, sha256: bytes) -> Built | None:
        """The program of that digest, 32 bytes, if it is here."""
        return self._programs.find(lambda built: built.sha256 == sha256)

    def add(self, data: bytes) -> Built:
        """Keeps a program that came from a client, checked.

        Raises:
          SpecError: it is damaged, of a newer JAX, or beyond the limits.
        """
        try:
            program = InitProgram.from_bytes(data)
        except ProgramFormatError as error:
            raise SpecError("program", [("chunk.data", str(error))]) from error
        shapes = [tuple(leaf.shape) for leaf in program.message.leaves]
        self._limits.check_leaves("program", shapes)
        return self._programs.get(program.sha256, lambda: _built(program, data))

    def _trace(self, spec: ModelSpec | str) -> Plan:
        if isinstance(spec, str):
            name, made = "program", InitProgram.from_bytes(self.program(spec).data)
        else:
            name, made = spec.model, build(spec)
        plan = make_plan(made)
        self._limits.check_leaves(name, [leaf.shape for leaf in plan.leaves])
        return plan

    # A build that has begun goes on whatever becomes of its caller, since others may
    # wait for it too: so it waits for the plan without a limit.

    def _place(
        self, spec: ModelSpec | str, request: service_pb2.DescribeModelRequest
    ) -> service_pb2.DescribeModelResponse:
        plan = self.plan(spec)
        if request.HasField("mesh"):
            mesh, rules = wire.mesh_from_proto(request.mesh), None
            if request.HasField("rules"):
                rules = wire.rules_from_proto(request.rules)
            plan = make_plan(plan, mesh=mesh, rules=rules)
        response = plan_to_proto(plan)
        _hold(
            response.ByteSize(),
            self._limits.response_bytes,
            "DescribeModel",
            "Ask for the program and plan it in the client",
        )
        return response

    def _export(self, spec: ModelSpec | str) -> Built:
        program = export_plan(self.plan(spec))
        data = program.to_bytes()
        _hold(
            len(data),
            self._limits.program_bytes,
            "GetProgram",
            "Do not capture arrays in the init function",
        )
        return _built(program, data)


def _name(spec: ModelSpec | str) -> str:
    """What a spec is cached under."""
    return spec if isinstance(spec, str) else spec.fingerprint


def _hold(size: int, most: int, call: str, remedy: str) -> None:
    if size > most:
        got, expected = f"the answer has {size:,} bytes", f"at most {most:,}"
        raise ServiceError(call, got, expected, remedy, code="RESOURCE_EXHAUSTED")


def _built(program: InitProgram, data: bytes) -> Built:
    digest = bytes.fromhex(program.sha256)
    return Built(data, digest, program.fingerprint, program.jax_version)


def _plan_bytes(plan: Plan) -> int:
    sources = (leaf.source for leaf in plan.cut.leaves)
    held = sum(x.array.nbytes for x in sources if isinstance(x, Constant))
    # Functions that came serialised are there twice: in the program, and apart.
    modules = (getattr(program, "module", b"") for program in plan.cut.programs)
    return held + 2 * sum(map(len, modules)) + _LEAF_BYTES * len(plan.leaves)
