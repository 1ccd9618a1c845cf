"""Rules: from what is known of a leaf to a partition spec.

Three kinds, of which a plan has one: ``AxisRules`` from logical axis names (as Flax
writes them), ``PathRules`` from leaf paths, and ``fsdp``, which needs no names.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from jax.sharding import PartitionSpec

from shardinit.core.plan.entries import MeshAxes, as_entry, mesh_axes, parts
from shardinit.core.plan.mesh import AnyMesh
from shardinit.errors import ShardingError


@dataclass(frozen=True)
class LeafInfo:
    """What rules look at: a leaf's path, shape and logical axis names (or None)."""

    path: str
    shape: tuple[int, ...]
    itemsize: int
    axes: tuple[str | None, ...] | None = None


@dataclass(frozen=True, init=False)
class AxisRules:
    """Logical axis name to mesh axes, first match first, as Flax's logical rules.

    A mesh axis is used once in a leaf: when an earlier dimension took it, the next
    rule for the name is tried, and without one the dimension stays whole. Names
    without a rule and leaves without names stay whole.

    Attributes:
      rules: pairs of logical axis name and mesh axis, tuple of mesh axes, or None.
    """

    rules: tuple[tuple[str, MeshAxes], ...]

    def __init__(self, rules: Iterable[tuple[str, MeshAxes | list[str]]]):
        fixed = tuple(
            (name, tuple(axes) if isinstance(axes, list) else axes)
            for name, axes in rules
        )
        object.__setattr__(self, "rules", fixed)

    def spec(self, leaf: LeafInfo, mesh: AnyMesh) -> PartitionSpec:
        """The partition spec of one leaf."""
        if leaf.axes is None:
            return PartitionSpec()
        used: set[str] = set()
        entries: list[MeshAxes] = []
        for name in leaf.axes:
            entries.append(self._entry(name, used))
        return PartitionSpec(*entries)

    def _entry(self, name: str | None, used: set[str]) -> MeshAxes:
        for rule, axes in self.rules:
            if rule != name:
                continue
            if axes is None:
                return None
            wanted = mesh_axes(axes)
            if not used.intersection(wanted):
                used.update(wanted)
                return axes
        return None

    def mesh_axes(self) -> set[str]:
        """All mesh axes that the rules name."""
        return {a for _, axes in self.rules for a in mesh_axes(axes)}


@dataclass(frozen=True, init=False)
class PathRules:
    """Regular expression over the leaf path to partition spec, first match first.

    An expression may match anywhere in the path (``re.search``); a leaf that none
    matches stays whole.
    """

    rules: tuple[tuple[str, PartitionSpec], ...]

    def __init__(self, rules: Iterable[tuple[str, PartitionSpec]]):
        fixed = tuple((str(pattern), PartitionSpec(*spec)) for pattern, spec in rules)
        for pattern, _ in fixed:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ShardingError(
                    f"path rule {pattern!r}",
                    f"it is no regular expression ({error})",
                    "a pattern for re.search",
                ) from error
        object.__setattr__(self, "rules", fixed)

    def spec(self, leaf: LeafInfo, mesh: AnyMesh) -> PartitionSpec:
        """The partition spec of one leaf."""
        for pattern, spec in self.rules:
            if re.search(pattern, leaf.path):
                return spec
        return PartitionSpec()

    def mesh_axes(self) -> set[str]:
        """All mesh axes that the rules name."""
        return {a for _, spec in self.rules for axes in spec for a in mesh_axes(axes)}


@dataclass(frozen=True)
class Fsdp:
    """Shards the largest axis that divides of every leaf above a size (see fsdp)."""

    axes: tuple[str, ...]
    min_bytes: int

    def spec(self, leaf: LeafInfo, mesh: AnyMesh) -> PartitionSpec:
        """The partition spec of one leaf."""
        axes = self.axes or tuple(mesh.axis_names)
        if math.prod(leaf.shape) * leaf.itemsize < self.min_bytes:
            return PartitionSpec()
        # All axes on one dimension if one divides; otherwise fewer axes, last first.
        for first in range(len(axes)):
            wanted = axes[first:]
            ways = parts(wanted, mesh.shape)
            sizes = [
                (size, -dim)
                for dim, size in enumerate(leaf.shape)
                if size % ways == 0 and size
            ]
            if sizes and ways > 1:
                dim = -max(sizes)[1]
                return PartitionSpec(*[None] * dim, as_entry(wanted))
        return PartitionSpec()

    def mesh_axes(self) -> set[str]:
        """All mesh axes that the rule names."""
        return set(self.axes)


def fsdp(*axes: str, min_bytes: int = 1 << 16) -> Fsdp:
    """Fully sharded: every leaf's largest divisible axis over ``axes``.

    Args:
      *axes: mesh axes to shard over together; none means all axes of the mesh.
      min_bytes: leaves smaller than this stay whole on every device.
    """
    return Fsdp(tuple(axes), min_bytes)


Rules = AxisRules | PathRules | Fsdp


def default_spec(leaf: LeafInfo, mesh: AnyMesh) -> PartitionSpec:
    """Without rules: names that are mesh axes count, else fsdp over all axes."""
    if leaf.axes is not None and any(a is not None for a in leaf.axes):
        known = set(mesh.axis_names)
        if all(a is None or set(mesh_axes(a)) <= known for a in leaf.axes):
            return PartitionSpec(*leaf.axes)
    return fsdp().spec(leaf, mesh)
