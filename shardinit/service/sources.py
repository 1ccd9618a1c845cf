"""Sources: from a spec to a plan or a program, each made once and kept while used.

A spec names a registered model or the digest of a program that is held here. Either way
what everything else needs is one thing, a plan without a mesh: to place it on a mesh
is quick, while tracing a model and exporting its functions takes seconds. So plans
are kept by spec, and programs by spec and by digest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import shardinit
from shardinit.errors import ProgramFormatError, ServiceError, SpecError
from shardinit.service.cache import BuildCache
from shardinit.service.limits import Limits

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


@dataclass(frozen=True)
class _Traced:
    """A plan's function where an init function is expected: it is not traced again."""

    plan: Any

    def as_cut(self) -> Any:
        return self.plan.cut

    def as_init_fn(self) -> Any:
        return self.plan.init_fn


class Sources:
    """Plans and programs of specs.

    Args:
      limits: caps on models and programs.
      cache_bytes: bound on what is kept of programs, and again of plans.
    """

    def __init__(self, limits: Limits, cache_bytes: int):
        self._limits = limits
        self._plans: BuildCache[Any] = BuildCache(cache_bytes, _plan_bytes)
        self._programs: BuildCache[Built] = BuildCache(
            cache_bytes, lambda built: len(built.data)
        )

    @property
    def bytes(self) -> int:
        """Bytes that are kept."""
        return self._plans.bytes + self._programs.bytes

    def plan(self, spec: Any, timeout: float | None = None) -> Any:
        """The plan of a spec without a mesh.

        Args:
          spec: a ``ModelSpec``, or the sha256 of a program that is held, in hex.
          timeout: seconds to wait for it.

        Raises:
          SpecError: the spec has faults.
          ServiceError: the program is not held, or it takes too long.
        """
        key = spec if isinstance(spec, str) else spec.fingerprint
        return self._plans.get(key, lambda: self._trace(spec), timeout)

    def placed(self, spec: Any, mesh: Any, rules: Any, timeout: float | None) -> Any:
        """The plan of a spec on a mesh; without one as `plan`.

        Raises:
          ShardingError: the rules do not fit the leaves.
        """
        made = self.plan(spec, timeout)
        if mesh is None:
            return made
        return shardinit.plan(_Traced(made), mesh=mesh, rules=rules)

    def program(self, spec: Any, timeout: float | None = None) -> Built:
        """The program of a spec; arguments and errors as for `plan`."""
        if isinstance(spec, str):
            return self._held(spec)
        made = self._programs.get(
            spec.fingerprint, lambda: self._export(spec, timeout), timeout
        )
        return self._programs.get(made.sha256.hex(), lambda: made)

    def find(self, digest: str) -> Built | None:
        """The program of a digest (hex) if it is held."""
        return self._programs.find(digest)

    def add(self, data: bytes) -> Built:
        """Keeps a program that came from a client, checked.

        Raises:
          SpecError: it is damaged, of a newer JAX, or beyond the limits.
        """
        try:
            program = shardinit.InitProgram.from_bytes(data)
        except ProgramFormatError as error:
            raise SpecError("program", [("chunk.data", str(error))]) from error
        shapes = [tuple(leaf.shape) for leaf in program.message.leaves]
        self._limits.check_leaves("program", shapes)
        made = _built(program, data)
        return self._programs.get(program.sha256, lambda: made)

    def _trace(self, spec: Any) -> Any:
        if isinstance(spec, str):
            name = "program"
            made: Any = shardinit.InitProgram.from_bytes(self._held(spec).data)
        else:
            from shardinit.models import build

            name, made = spec.model, build(spec)
        plan = shardinit.plan(made)
        self._limits.check_leaves(name, [leaf.shape for leaf in plan.leaves])
        return plan

    def _export(self, spec: Any, timeout: float | None) -> Built:
        program = shardinit.export_plan(self.plan(spec, timeout))
        data = program.to_bytes()
        if len(data) > self._limits.program_bytes:
            raise ServiceError(
                "GetProgram",
                f"the program has {len(data):,} bytes",
                f"at most {self._limits.program_bytes:,}",
                "Do not capture arrays in the init function",
                code="RESOURCE_EXHAUSTED",
            )
        return _built(program, data)

    def _held(self, digest: str) -> Built:
        found = self._programs.find(digest)
        if found is None:
            raise ServiceError(
                "program_sha256",
                f"no program {digest[:16]}… is held here",
                remedy="Ask by model and config, or upload the program",
                code="NOT_FOUND",
            )
        return found


def _built(program: Any, data: bytes) -> Built:
    digest = bytes.fromhex(program.sha256)
    return Built(data, digest, program.fingerprint, program.jax_version)


def _plan_bytes(plan: Any) -> int:
    constants = (leaf.const for leaf in plan.cut.leaves)
    held = sum(const.nbytes for const in constants if const is not None)
    return held + _LEAF_BYTES * len(plan.leaves)
