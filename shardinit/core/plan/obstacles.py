"""Why an axis lies whole that no rule keeps whole, each with what would help."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

from jax.sharding import PartitionSpec

from shardinit.core.plan.entries import MeshAxes, mesh_axes, mesh_axes_of
from shardinit.core.plan.leaf_info import WHOLE, Cause, LeafInfo, Obstacle, Reason
from shardinit.core.plan.mesh import AnyMesh


def no_names(leaf: LeafInfo, mesh: AnyMesh) -> Reason:
    """The leaf has no axis names that a rule could be for."""
    return Reason(
        Cause(Obstacle.NO_NAMES),
        f"Name its axes in the model, or {_path_rule(leaf, mesh)}",
    )


def no_rule(
    leaf: LeafInfo,
    mesh: AnyMesh,
    names: Mapping[int, str],
    spec: PartitionSpec,
    preferred: Collection[str] = (),
) -> tuple[Reason, ...]:
    """No rule is for some of its names.

    Of a leaf that other names cut it is said where a rule could cut it further.

    Args:
      leaf: the leaf.
      mesh: the mesh.
      names: those names, by the dimension that they name.
      spec: how the leaf lies.
      preferred: mesh axes that the remedy names first.
    """
    cut = _free_cut(leaf, mesh, names, spec, preferred)
    if not names or (cut is None and mesh_axes_of(spec)):
        return ()
    distinct = list(dict.fromkeys(names.values()))
    if len(distinct) == 1:
        obstacle, remedy = Obstacle.NO_RULE, f"({distinct[0]!r}, None)"
    else:
        obstacle, remedy = Obstacle.NO_RULES, "None for each of them"
    if cut is not None:
        dim, axis = cut
        remedy = f"({names[dim]!r}, {axis!r}) to the rules, or {remedy}"
    cause = Cause(obstacle, (", ".join(map(repr, distinct)),))
    return (Reason(cause, f"Add {remedy}"),)


def no_path_rule(leaf: LeafInfo, mesh: AnyMesh) -> Reason:
    """No path rule matches its path."""
    return Reason(Cause(Obstacle.NO_PATH_RULE), _path_rule(leaf, mesh))


def indivisible(leaf: LeafInfo, mesh: AnyMesh, axes: tuple[str, ...]) -> Reason:
    """Of none of its axes the size divides by the mesh axes."""
    ways = " x ".join(f"{axis}={mesh.shape[axis]}" for axis in axes)
    return Reason(
        Cause(Obstacle.NO_AXIS_DIVIDES, (leaf.shape, ways)),
        f"Pad one of its axes, or keep it whole: PathRules([..., ({_pattern(leaf)!r}, "
        "PartitionSpec())])",
    )


def undivided(leaf: LeafInfo, dim: int, entry: MeshAxes, mesh: AnyMesh) -> Reason:
    """One axis does not divide by the mesh axes of its rule."""
    name = leaf.axes[dim] if leaf.axes else None
    sizes = {axis: mesh.shape[axis] for axis in mesh_axes(entry)}
    ways = " x ".join(f"{axis}={size}" for axis, size in sizes.items())
    axis = f"axis {dim}" + (f" ({name!r})" if name else "")
    rule = (name, None) if name else (_pattern(leaf), "PartitionSpec()")
    return Reason(
        Cause(Obstacle.AXIS_UNDIVIDED, (axis, leaf.shape[dim], ways)),
        f"Pad the axis, or keep it whole with a rule {rule}",
    )


def _path_rule(leaf: LeafInfo, mesh: AnyMesh) -> str:
    dims = range(len(leaf.shape))
    dim, axis = _free_cut(leaf, mesh, dims, WHOLE) or (0, mesh.axis_names[0])
    entries = ", ".join([*["None"] * dim, repr(axis)])
    rule = f"({_pattern(leaf)!r}, PartitionSpec({entries}))"
    return f"PathRules([..., {rule}]); PartitionSpec() keeps it whole"


def _free_cut(
    leaf: LeafInfo,
    mesh: AnyMesh,
    dims: Iterable[int],
    spec: PartitionSpec,
    preferred: Collection[str] = (),
) -> tuple[int, str] | None:
    """The longest of these dimensions that a mesh axis divides which is free yet."""
    used = mesh_axes_of(spec)
    longest = sorted(dims, key=lambda dim: -leaf.shape[dim])
    for axis in sorted(mesh.axis_names, key=lambda name: name not in preferred):
        ways = mesh.shape[axis]
        for dim in longest if ways > 1 and axis not in used else ():
            if leaf.shape[dim] and leaf.shape[dim] % ways == 0:
                return dim, axis
    return None


def _pattern(leaf: LeafInfo) -> str:
    # A path may hold dots and brackets, which a pattern reads otherwise.
    return f"^{re.escape(leaf.path)}$"
