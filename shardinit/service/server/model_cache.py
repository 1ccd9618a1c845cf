"""Model cache: what a worker keeps of a spec, made once and kept while used.

A spec names a registered model or the digest of a program in the store. Either way what
everything else needs is one thing, a plan without a mesh: to place it on a mesh is
quick, while tracing a model and exporting its functions takes seconds. So plans are
kept by spec, and what a stream reads from by its request.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from shardinit.core.cut.sources import Constant
from shardinit.core.plan.plan import Plan
from shardinit.core.plan.planning import plan as make_plan
from shardinit.core.program.program import InitProgram, export_plan
from shardinit.errors import ProgramFormatError, ServiceError, SpecError
from shardinit.models import ModelSpec, build
from shardinit.service.server import store
from shardinit.service.server.cache import Kept
from shardinit.service.server.config import Config
from shardinit.service.wire import messages as wire
from shardinit.service.wire.description import plan_to_proto
from shardinit.v1 import service_pb2

_LEAF_BYTES = 4096  # what one leaf of a plan takes, about


class ModelCache:
    """Plans of specs, and what is made of them.

    Args:
      config: caps on models and programs, and what may be kept.
      evicted: called for each plan that goes to make room.

    Attributes:
      owner: whose programs the job that is being done finds among what is kept.
    """

    def __init__(self, config: Config, evicted: Callable[[], None] = lambda: None):
        self.owner = ""
        self._limits = config.limits
        self._store = config.store or Path(".")
        self._plans: Kept[Plan] = Kept(config.cache_bytes, _plan_bytes, evicted)

    @property
    def bytes(self) -> int:
        """Bytes of plans that are kept."""
        return self._plans.bytes

    def plan(self, spec: ModelSpec | str) -> Plan:
        """The plan of a spec without a mesh.

        Args:
          spec: a ``ModelSpec``, or the sha256 of a program in the store, in hex.

        Raises:
          SpecError: the spec has faults.
          ServiceError: the program is not there.
        """
        program = isinstance(spec, str)
        name = (self.owner, spec) if program else spec.fingerprint
        found = self._plans.get(name)
        if found is None:
            found = self._trace(spec)
            self._plans.put(name, found)
        return found

    def describe(
        self, request: service_pb2.DescribeModelRequest
    ) -> service_pb2.DescribeModelResponse:
        """What a spec consists of, and where it lies; errors as for `plan`.

        Raises:
          ShardingError: the rules do not fit the leaves.
        """
        plan = self.plan(wire.spec_from_proto(request.spec))
        if request.HasField("mesh"):
            self._limits.check_rules(request, len(plan.leaves))
            placing = wire.placing_from_proto(request)
            plan = make_plan(plan, mesh=wire.mesh_from_proto(request.mesh), **placing)
        return plan_to_proto(plan)

    def program(self, spec: ModelSpec | str) -> tuple[service_pb2.ProgramHeader, bytes]:
        """The program of a spec, with its header; errors as for `plan`."""
        program = export_plan(self.plan(spec))
        data = program.to_bytes()
        if len(data) > self._limits.program_bytes:
            raise ServiceError(
                "GetProgram",
                f"the program has {len(data):,} bytes",
                f"at most {self._limits.program_bytes:,}",
                "Do not capture arrays in the init function",
                code="RESOURCE_EXHAUSTED",
                limit="program_bytes",
            )
        return _header(program, data), data

    def check(self, data: bytes) -> service_pb2.ProgramHeader:
        """The header of a program that came from a client, tried.

        Raises:
          SpecError: it is damaged, of a newer JAX, or beyond the limits.
        """
        try:
            program = InitProgram.from_bytes(data, untrusted=True)
        except ProgramFormatError as error:
            raise SpecError("program", [("chunk.data", str(error))]) from error
        shapes = [tuple(leaf.shape) for leaf in program.message.leaves]
        self._limits.check_leaves("program", shapes)
        return _header(program, data)

    def _trace(self, spec: ModelSpec | str) -> Plan:
        if isinstance(spec, str):
            name, plan = "program", make_plan(self._stored(bytes.fromhex(spec)))
        else:
            key = dict.fromkeys(spec.key_streams, 0) or 0
            name = spec.model
            plan = make_plan(build(spec), key=key, draw_dtype=spec.draw_dtype)
        self._limits.check_leaves(name, [leaf.shape for leaf in plan.leaves])
        return plan

    def _stored(self, sha256: bytes) -> InitProgram:
        """A program of the store; an uploaded one has the identity of its bytes."""
        header, data = store.read(self._store, sha256)
        program = InitProgram.from_bytes(data)
        uploaded = program.fingerprint != header.fingerprint
        return replace(program, untrusted=uploaded)


def _header(program: InitProgram, data: bytes) -> service_pb2.ProgramHeader:
    return service_pb2.ProgramHeader(
        size=len(data),
        sha256=bytes.fromhex(program.sha256),
        fingerprint=program.fingerprint,
        jax_version=program.jax_version,
    )


def _plan_bytes(plan: Plan) -> int:
    sources = (leaf.source for leaf in plan.cut.leaves)
    held = sum(x.array.nbytes for x in sources if isinstance(x, Constant))
    # Functions that came serialised are there twice: in the program, and apart.
    modules = (getattr(program, "module", b"") for program in plan.cut.programs)
    return held + 2 * sum(map(len, modules)) + _LEAF_BYTES * len(plan.leaves)
