"""Wire: the only place where protobuf messages and Python's objects meet.

Each pair of functions is one message: ``x_to_proto`` for who asks, ``x_from_proto``
for who answers. What comes from the wire has passed ``limits`` before it gets here.
JAX is imported only by the functions that make one of its objects, since a client
that only asks needs none of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf import struct_pb2

from shardinit.errors import ServiceError, SpecError
from shardinit.v1 import service_pb2, spec_pb2

_MAX_EXACT = 2**53  # a Struct has doubles only
_MAX_DEPTH = 30  # beyond it protobuf refuses to parse a Struct


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
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    spec: tuple[tuple[str, ...], ...] | None
    bytes_per_device: int
    program: int
    whole: str


@dataclass(frozen=True)
class Description:
    """What a model consists of: ``client.describe``'s answer.

    Attributes:
      fingerprint: of the init function, in hex.
      total_bytes: bytes of all leaves.
      bytes_per_device: bytes of the shards on one device.
      parameter_count: elements of all leaves.
      programs: number of distinct programs.
      leaves: the leaves in the order of the pytree.
    """

    fingerprint: str
    total_bytes: int
    bytes_per_device: int
    parameter_count: int
    programs: int
    leaves: tuple[LeafDescription, ...]


def spec_to_proto(spec: Any) -> spec_pb2.ModelSpec:
    """A ``ModelSpec``, an ``InitProgram`` or a program's sha256 (hex) as a message.

    Raises:
      SpecError: the config holds what the wire cannot carry.
      TypeError: ``spec`` is none of these.
    """
    digest = spec if isinstance(spec, str) else getattr(spec, "sha256", None)
    if isinstance(digest, str):
        if not re.fullmatch(r"[0-9a-fA-F]{64}", digest):
            fault = f"{digest[:80]!r} is no SHA-256 in hex, 64 digits"
            raise SpecError("program", [("program_sha256", fault)])
        return spec_pb2.ModelSpec(program_sha256=bytes.fromhex(digest))
    model, config = getattr(spec, "model", None), getattr(spec, "config", None)
    if not isinstance(model, str) or not isinstance(config, Mapping):
        raise TypeError(
            f"spec: got {type(spec).__name__}; expected a shardinit.ModelSpec or the "
            f"sha256 of a program in hex"
        )
    faults: list[tuple[str, str]] = []
    _check_plain("", config, faults)
    if faults:
        raise SpecError(model, faults)
    named = spec_pb2.NamedModel(model=model)
    named.config.update(dict(config))
    return spec_pb2.ModelSpec(named=named)


def _check_plain(
    where: str, value: Any, faults: list[tuple[str, str]], depth: int = 0
) -> None:
    if depth > _MAX_DEPTH:
        faults.append(("config", f"nested deeper than {_MAX_DEPTH}"))
    elif isinstance(value, Mapping):
        for key, item in value.items():
            inner = f"{where}.{key}" if where else str(key)
            _check_plain(inner, item, faults, depth + 1)
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            _check_plain(f"{where}[{i}]", item, faults, depth + 1)
    elif isinstance(value, int) and abs(value) > _MAX_EXACT:
        faults.append((where, f"{value} is beyond 2^53, which the wire cannot carry"))


def spec_from_proto(message: spec_pb2.ModelSpec) -> Any:
    """A ``ModelSpec``, or the sha256 (hex) of a program.

    Raises:
      SpecError: the config is not plain data.
    """
    from shardinit.models import ModelSpec

    if message.WhichOneof("spec") == "program_sha256":
        return message.program_sha256.hex()
    return ModelSpec(message.named.model, struct_to_dict(message.named.config))


def struct_to_dict(struct: struct_pb2.Struct) -> dict[str, Any]:
    """A ``Struct`` as plain Python data."""
    return {key: _plain(value) for key, value in struct.fields.items()}


def _plain(value: struct_pb2.Value) -> Any:
    kind = value.WhichOneof("kind")
    if kind == "struct_value":
        return struct_to_dict(value.struct_value)
    if kind == "list_value":
        return [_plain(item) for item in value.list_value.values]
    return None if kind in (None, "null_value") else getattr(value, kind)


def mesh_to_proto(mesh: Any) -> spec_pb2.MeshSpec:
    """A ``Mesh``, an ``AbstractMesh`` or a mapping of axis name to size."""
    shape = mesh if isinstance(mesh, Mapping) else mesh.shape
    axes = [spec_pb2.MeshAxis(name=str(n), size=int(s)) for n, s in shape.items()]
    return spec_pb2.MeshSpec(axes=axes)


def mesh_from_proto(message: spec_pb2.MeshSpec) -> Any:
    """An ``AbstractMesh``: no device is looked for."""
    from jax.sharding import AbstractMesh

    return AbstractMesh(
        tuple(axis.size for axis in message.axes),
        tuple(axis.name for axis in message.axes),
    )


def rules_to_proto(rules: Any) -> spec_pb2.ShardingRules:
    """``AxisRules``, ``PathRules`` or ``fsdp(...)`` as a message.

    Raises:
      TypeError: ``rules`` is none of these.
    """
    from shardinit.core import sharding  # whoever has rules has imported it already

    result = spec_pb2.ShardingRules()
    if isinstance(rules, sharding.AxisRules):
        result.axis_rules.SetInParent()
        for name, axes in rules.rules:
            result.axis_rules.rules.add(logical=name, mesh_axes=_axes(axes))
    elif isinstance(rules, sharding.PathRules):
        result.path_rules.SetInParent()
        for pattern, spec in rules.rules:
            entries = [spec_pb2.Dimension(mesh_axes=_axes(entry)) for entry in spec]
            result.path_rules.rules.add(pattern=pattern, dimensions=entries)
    elif isinstance(rules, sharding.Fsdp):
        result.fsdp.mesh_axes.extend(rules.axes)
        result.fsdp.min_bytes = rules.min_bytes
    else:
        raise TypeError(
            f"rules: got {type(rules).__name__}; expected AxisRules([...]), "
            f"PathRules([...]) or fsdp(...)"
        )
    return result


def _axes(entry: Any) -> tuple[str, ...]:
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def _entry(axes: Any) -> str | tuple[str, ...] | None:
    return None if not axes else axes[0] if len(axes) == 1 else tuple(axes)


def rules_from_proto(message: spec_pb2.ShardingRules) -> Any:
    """``AxisRules``, ``PathRules`` or ``fsdp(...)``."""
    from jax.sharding import PartitionSpec

    from shardinit.core import sharding

    kind = message.WhichOneof("rules")
    if kind == "axis_rules":
        return sharding.AxisRules(
            (rule.logical, _entry(rule.mesh_axes)) for rule in message.axis_rules.rules
        )
    if kind == "path_rules":
        return sharding.PathRules(
            (
                rule.pattern,
                PartitionSpec(*(_entry(d.mesh_axes) for d in rule.dimensions)),
            )
            for rule in message.path_rules.rules
        )
    return sharding.fsdp(*message.fsdp.mesh_axes, min_bytes=message.fsdp.min_bytes)


def plan_to_proto(plan: Any) -> service_pb2.DescribeModelResponse:
    """A ``Plan`` as the answer to DescribeModel."""
    result = service_pb2.DescribeModelResponse(
        fingerprint=plan.fingerprint,
        total_bytes=plan.total_bytes,
        bytes_per_device=plan.bytes_per_device,
        parameter_count=plan.parameter_count,
        programs=len(plan.programs),
    )
    kinds: dict[Any, int] = {}
    for leaf in plan.leaves:
        spec = () if leaf.sharding is None else tuple(map(_axes, leaf.sharding.spec))
        kind = (leaf.shape, str(leaf.dtype), spec, leaf.program, leaf.whole)
        if kind not in kinds:
            kinds[kind] = len(kinds)
            result.kinds.add(
                shape=leaf.shape,
                dtype=str(leaf.dtype),
                dimensions=[spec_pb2.Dimension(mesh_axes=axes) for axes in spec],
                bytes_per_device=leaf.bytes_per_device,
                program=leaf.program,
                whole=leaf.whole,
            )
        result.leaves.add(path=leaf.path, kind=kinds[kind])
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
            )
        )
    return Description(
        message.fingerprint,
        message.total_bytes,
        message.bytes_per_device,
        message.parameter_count,
        message.programs,
        tuple(leaves),
    )
