"""Description: what a model consists of, as ``client.describe`` tells it.

A model of thousands of layers has few kinds of leaves, so the message lists the kinds
once and names them by number. Where leaves lie in the pytree travels as the flat list
of nodes that init programs use too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import compress
from typing import TYPE_CHECKING, Any

from shardinit.core.paths import chosen, nearest
from shardinit.core.plan.entries import mesh_axes
from shardinit.core.plan.findings import Finding
from shardinit.errors import SelectError, ServiceError
from shardinit.v1 import program_pb2, service_pb2, spec_pb2

if TYPE_CHECKING:
    from shardinit.core.plan.options import Select
    from shardinit.core.plan.plan import Plan


_SEVERITIES = {
    "warning": service_pb2.SEVERITY_WARNING,
    "note": service_pb2.SEVERITY_NOTE,
}


@dataclass(frozen=True)
class LeafDescription:
    """One leaf as a service describes it.

    Attributes:
      path: its key path, ``/``-joined.
      shape: its global shape.
      dtype: name of its element type.
      spec: mesh axes of each leading dimension; None without a mesh.
      bytes_per_device: bytes of one shard; of the leaf, without a mesh.
      program: number of the program that makes it; -1 for a constant.
      whole: why every device computes the full leaf; empty when it does not.
      memory_kind: such as "pinned_host"; empty for the device's own.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    spec: tuple[tuple[str, ...], ...] | None
    bytes_per_device: int
    program: int
    whole: str
    memory_kind: str = ""

    @property
    def is_hosted(self) -> bool:
        """Whether no program makes it: a constant, or keys."""
        return self.program == -1


@dataclass(frozen=True)
class Description:
    """What a model consists of: ``client.describe``'s answer.

    Attributes:
      fingerprint: of the init function, in hex.
      total_bytes: bytes of all leaves.
      bytes_per_device: bytes of the shards in one device's own memory.
      parameter_count: elements of all leaves.
      programs: number of distinct programs.
      leaves: the leaves in the order of the pytree.
      nodes: the pytree, as ``program.proto`` writes it.
      findings: what a careful colleague would say of it, as in ``Plan.findings``; the
        rules in it are text.
      host_bytes_per_device: bytes of a device's shards in other memory.
    """

    fingerprint: str
    total_bytes: int
    bytes_per_device: int
    parameter_count: int
    programs: int
    leaves: tuple[LeafDescription, ...]
    nodes: tuple[program_pb2.Node, ...] = field(default=(), repr=False, compare=False)
    findings: tuple[Finding, ...] = ()
    host_bytes_per_device: int = 0

    def chosen(self, select: Select | None) -> list[LeafDescription]:
        """The leaves that globs over paths, or a predicate, take; None takes all.

        Raises:
          SelectError: a glob that matches no leaf.
        """
        taken = chosen(select, [leaf.path for leaf in self.leaves])
        return list(compress(self.leaves, taken))

    def leaf(self, path: str) -> LeafDescription:
        """The leaf of that path.

        Raises:
          SelectError: there is none.
        """
        for leaf in self.leaves:
            if leaf.path == path:
                return leaf
        known = nearest(path, [leaf.path for leaf in self.leaves])
        raise SelectError(f"path {path!r}", "no such leaf", known)


def plan_to_proto(plan: Plan) -> service_pb2.DescribeModelResponse:
    """A ``Plan`` as the answer to DescribeModel."""
    from shardinit.core.program.treedef import write_tree

    result = service_pb2.DescribeModelResponse(
        fingerprint=plan.fingerprint,
        total_bytes=plan.total_bytes,
        bytes_per_device=plan.bytes_per_device,
        host_bytes_per_device=plan.host_bytes_per_device,
        parameter_count=plan.parameter_count,
        programs=len(plan.programs),
        nodes=write_tree(plan.cut.tree),
    )
    kinds: dict[Any, int] = {}
    for leaf in plan.leaves:
        spec = (
            () if leaf.sharding is None else tuple(map(mesh_axes, leaf.sharding.spec))
        )
        where = (spec, leaf.memory_kind)
        kind = (leaf.shape, str(leaf.dtype), where, leaf.program, leaf.whole)
        if kind not in kinds:
            kinds[kind] = len(kinds)
            result.kinds.add(
                shape=leaf.shape,
                dtype=str(leaf.dtype),
                dimensions=[spec_pb2.Dimension(mesh_axes=axes) for axes in spec],
                bytes_per_device=leaf.bytes_per_device,
                program=leaf.program,
                whole=leaf.whole,
                memory_kind=leaf.memory_kind,
            )
        result.leaves.add(path=leaf.path, kind=kinds[kind])
    numbers = {leaf.path: number for number, leaf in enumerate(plan.leaves)}
    for found in plan.findings:
        result.findings.add(
            kind=found.kind,
            severity=_SEVERITIES[found.severity],
            leaves=[numbers[path] for path in found.leaves],
            rules=found.rules_as_text,
            reason=found.reason,
            remedy=found.remedy,
        )
    return result


def description_from_proto(
    message: service_pb2.DescribeModelResponse, *, placed: bool
) -> Description:
    """The answer to DescribeModel; ``placed``: it was asked for with a mesh.

    Raises:
      ServiceError: the answer contradicts itself.
    """
    leaves = []
    for leaf in message.leaves:
        if leaf.kind >= len(message.kinds):
            raise ServiceError(
                "DescribeModel", f"leaf {leaf.path!r} is of no kind", code="DATA_LOSS"
            )
        kind = message.kinds[leaf.kind]
        spec = tuple(tuple(entry.mesh_axes) for entry in kind.dimensions)
        leaves.append(
            LeafDescription(
                leaf.path,
                tuple(kind.shape),
                kind.dtype,
                spec if placed else None,
                kind.bytes_per_device,
                kind.program,
                kind.whole,
                kind.memory_kind,
            )
        )
    return Description(
        message.fingerprint,
        message.total_bytes,
        message.bytes_per_device,
        message.parameter_count,
        message.programs,
        tuple(leaves),
        tuple(message.nodes),
        tuple(_finding(found, leaves) for found in message.findings),
        message.host_bytes_per_device,
    )


def _finding(
    message: service_pb2.Finding, leaves: Sequence[LeafDescription]
) -> Finding:
    if any(number >= len(leaves) for number in message.leaves):
        raise ServiceError(
            "DescribeModel",
            f"the finding {message.kind!r} is about a leaf that is not there",
            code="DATA_LOSS",
        )
    warns = message.severity == service_pb2.SEVERITY_WARNING
    return Finding(
        message.kind,
        "warning" if warns else "note",
        tuple(leaves[number].path for number in message.leaves),
        tuple(message.rules),
        message.reason,
        message.remedy,
    )
