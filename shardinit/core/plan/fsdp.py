"""``fsdp``: rules that need no names, only sizes."""

from __future__ import annotations

from dataclasses import dataclass

from jax.sharding import PartitionSpec

from shardinit.core.plan import obstacles
from shardinit.core.plan.entries import as_entry, parts
from shardinit.core.plan.leaf_info import Choice, LeafInfo
from shardinit.core.plan.mesh import AnyMesh
from shardinit.errors import ArgumentError


@dataclass(frozen=True)
class Fsdp:
    """Shards the largest axis that divides of every leaf above a size (see fsdp)."""

    axes: tuple[str, ...]
    min_bytes: int

    def mesh_axes(self) -> set[str]:
        """All mesh axes that the rule names."""
        return set(self.axes)

    def choose(self, leaf: LeafInfo, mesh: AnyMesh, indivisible: str) -> Choice:
        """Where one leaf lies; an axis that does not divide is never taken."""
        axes = self.axes or tuple(mesh.axis_names)
        if leaf.nbytes < self.min_bytes:
            return Choice()
        # All axes on one dimension if one divides; otherwise fewer axes, last first.
        for first in range(len(axes)):
            wanted = axes[first:]
            ways = parts(wanted, mesh.shape)
            # An axis of size 0 divides by everything, and there is nothing of it to
            # shard.
            sizes = [
                (size, -dim)
                for dim, size in enumerate(leaf.shape)
                if size % ways == 0 and size
            ]
            if sizes and ways > 1:
                dim = -max(sizes)[1]
                return Choice(PartitionSpec(*[None] * dim, as_entry(wanted)))
        return Choice(reasons=(obstacles.indivisible(leaf, mesh, axes),))


def fsdp(*axes: str, min_bytes: int = 1 << 16) -> Fsdp:
    """Fully sharded: every leaf's largest divisible axis over ``axes``.

    Args:
      *axes: mesh axes to shard over together; none means all axes of the mesh.
      min_bytes: leaves smaller than this stay whole on every device.

    Raises:
      ArgumentError: an axis is no name, or ``min_bytes`` no number of bytes.

    Example:
      >>> rules = fsdp("data", min_bytes=1 << 20)
    """
    if not all(isinstance(axis, str) for axis in axes):
        raise ArgumentError(
            "fsdp", f"got {axes!r}", "names of mesh axes", 'Write fsdp("data", "model")'
        )
    ArgumentError.check_bytes("min_bytes", min_bytes)
    return Fsdp(tuple(axes), min_bytes)
