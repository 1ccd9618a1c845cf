"""Placement in a program's message: axis names, what is attached to them, shardings.

What is lost here is lost in silence: a leaf of which the file forgot the model's own
rules would lie otherwise than the same leaf of the function. A mesh of the model's own
comes back without its devices, which are not there where the file is read.
"""

from __future__ import annotations

import math

from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from shardinit.core.init_fn import AxisNames
from shardinit.core.plan.entries import as_entry, mesh_axes
from shardinit.core.plan.leaf_info import LeafInfo
from shardinit.v1 import program_pb2 as pb

_MAX_DEVICES = 1 << 24


def write_axes(info: LeafInfo, out: pb.Leaf) -> None:
    """Writes the names of a leaf's axes into its message."""
    if info.axes is None:
        return
    out.has_axes = True
    out.axes.extend(name if isinstance(name, str) else "" for name in info.axes)
    metadata = pb.AxisMetadata(passes=info.passes)
    for dimension, name in enumerate(info.axes):
        if isinstance(name, tuple):
            metadata.groups.add(dimension=dimension, mesh_axes=name)
    for logical, axes in info.own_rules:
        metadata.rules.add(logical=logical, mesh_axes=mesh_axes(axes))
    named = len(info.axes) if info.named is None else info.named
    # Plain names need no more; and files that were written so keep their bytes.
    if metadata.ByteSize() or named != len(info.axes):
        metadata.named = named
        out.axis_metadata.CopyFrom(metadata)


def read_axes(leaf: pb.Leaf) -> AxisNames | None:
    """The names that ``write_axes`` wrote; None where none are known.

    Raises:
      ValueError: they contradict each other.
    """
    if not leaf.has_axes:
        rank = len(leaf.shape)
        return AxisNames((), rank, optimizer=True) if leaf.optimizer else None
    names: list[str | tuple[str, ...] | None] = [name or None for name in leaf.axes]
    if not leaf.HasField("axis_metadata"):
        return AxisNames(names, len(names), optimizer=leaf.optimizer)
    metadata = leaf.axis_metadata
    if metadata.named > len(names):
        raise ValueError(f"leaf {leaf.path!r} names {metadata.named} dimensions")
    for group in metadata.groups:
        if group.dimension >= len(names):
            raise ValueError(f"leaf {leaf.path!r} names dimension {group.dimension}")
        names[group.dimension] = tuple(group.mesh_axes)
    rules = [(rule.logical, as_entry(rule.mesh_axes)) for rule in metadata.rules]
    named = names[: metadata.named]
    return AxisNames(
        named,
        len(names),
        passes=metadata.passes,
        rules=rules,
        optimizer=leaf.optimizer,
    )


def write_stated(sharding: NamedSharding, out: pb.StatedSharding) -> None:
    """Writes the sharding that the function itself gives a leaf."""
    for name, size in sharding.mesh.shape.items():
        out.mesh.axes.add(name=name, size=size)
    for dimension, entry in enumerate(sharding.spec):
        # An unconstrained dimension is neither a name nor names: it is left whole.
        if isinstance(entry, str | tuple) and entry:
            out.dimensions.add(dimension=dimension, mesh_axes=mesh_axes(entry))
    out.memory_kind = sharding.memory_kind or ""


def read_stated(leaf: pb.Leaf) -> NamedSharding | None:
    """The sharding that ``write_stated`` wrote, on a mesh without devices.

    Raises:
      ValueError: it cuts what is not there.
    """
    if not leaf.HasField("stated"):
        return None
    stated = leaf.stated
    sizes = {axis.name: axis.size for axis in stated.mesh.axes}
    entries: list[tuple[str, ...]] = [()] * len(leaf.shape)
    for cut in stated.dimensions:
        if cut.dimension >= len(entries):
            raise ValueError(f"leaf {leaf.path!r} cuts dimension {cut.dimension}")
        entries[cut.dimension] = tuple(cut.mesh_axes)
    if min(sizes.values(), default=0) < 1 or math.prod(sizes.values()) > _MAX_DEVICES:
        raise ValueError(f"leaf {leaf.path!r} lies on a mesh of sizes {sizes}")
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
    spec = PartitionSpec(*map(as_entry, entries))
    return NamedSharding(mesh, spec, memory_kind=stated.memory_kind or None)
