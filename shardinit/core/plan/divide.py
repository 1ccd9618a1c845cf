"""Whether the axes of a leaf divide by the mesh axes that rules give them."""

from __future__ import annotations

from shardinit.core.plan.entries import MeshAxes, mesh_axes, parts
from shardinit.core.plan.leaf_info import LeafInfo
from shardinit.core.plan.logical import Fits
from shardinit.core.plan.mesh import AnyMesh


def fits_of(leaf: LeafInfo, mesh: AnyMesh, indivisible: str) -> Fits:
    """Whether a dimension may be cut: by ``"error"`` it may, and is refused later."""
    if indivisible == "error":
        return lambda dim, axes: True
    return lambda dim, axes: divides(leaf, dim, axes, mesh)


def divides(leaf: LeafInfo, dim: int, entry: MeshAxes, mesh: AnyMesh) -> bool:
    """Whether a dimension divides; what the mesh or the leaf lacks is refused later."""
    known = all(axis in mesh.shape for axis in mesh_axes(entry))
    return not (known and dim < len(leaf.shape)) or (
        leaf.shape[dim] % parts(entry, mesh.shape) == 0
    )
