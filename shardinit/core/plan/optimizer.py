"""Where optimizer state lies: as the parameters that it mirrors, or further apart."""

from __future__ import annotations

import math
from dataclasses import replace

from jax.sharding import PartitionSpec

from shardinit.core.plan.entries import MeshAxes, as_entry, mesh_axes, mesh_axes_of
from shardinit.core.plan.entries import parts as parts_of
from shardinit.core.plan.fsdp import Fsdp
from shardinit.core.plan.leaf_info import Choice, LeafInfo
from shardinit.core.plan.mesh import AnyMesh
from shardinit.core.plan.placement import Placement, axes_of, kind_of
from shardinit.core.plan.rules import DefaultRules, PathRules, Rules


def mirrored(leaf: LeafInfo, source: Choice) -> Choice:
    """The choice for a leaf that mirrors another, of which rules chose ``source``."""
    dims = leaf.mirrors.dims if leaf.mirrors is not None else ()
    entries = dict(enumerate(source.spec))
    # As it is: ``P("data") != P("data", None)`` to JAX, and whoever compares the
    # sharding of a moment with its parameter's finds them equal.
    if None not in dims and list(dims) == list(range(max(len(dims), len(entries)))):
        return source
    spec = [None if dim is None else entries.get(dim) for dim in dims]
    kept = set(dims) >= set(entries)
    return replace(
        source, spec=PartitionSpec(*spec), reasons=source.reasons if kept else ()
    )


def names_itself(rules: Rules | DefaultRules, leaf: LeafInfo, source: LeafInfo) -> bool:
    """Whether a path rule is for a leaf itself and not for the one that it mirrors."""
    if not isinstance(rules, PathRules):
        return False
    for pattern, _ in rules.rules:
        if rules.matches(pattern, source.path):
            return False
        if rules.matches(pattern, leaf.path):
            return True
    return False


def for_optimizer(
    leaf: LeafInfo,
    choice: Choice,
    opt_rules: Rules | Placement | None,
    mesh: AnyMesh,
    indivisible: str,
) -> Choice:
    """Where a leaf lies: if it is optimizer state, by the rules for that as well.

    Args:
      leaf: the leaf.
      choice: of the rules for all leaves.
      opt_rules: rules for optimizer state alone.
      mesh: the mesh.
      indivisible: as for ``AxisRules.choose``.
    """
    if not leaf.optimizer:
        return choice
    if math.prod(leaf.shape) <= 1:  # scalars lie everywhere
        return Choice()
    rules = axes_of(opt_rules)
    if isinstance(rules, Fsdp):
        choice = _further(leaf, choice, rules, mesh)
    elif rules is not None:
        found = rules.choose(leaf, mesh, indivisible)
        choice = found if found.rules else choice
    return replace(choice, memory_kind=kind_of(opt_rules) or choice.memory_kind)


def _further(leaf: LeafInfo, choice: Choice, rules: Fsdp, mesh: AnyMesh) -> Choice:
    """The choice with the axes of ``rules`` that it leaves free, on one dimension.

    As ``fsdp`` does without it: all axes together if a dimension divides, else fewer.
    """
    used = set(mesh_axes_of(choice.spec))
    free = [axis for axis in rules.axes or mesh.axis_names if axis not in used]
    if leaf.nbytes < rules.min_bytes:
        return choice
    rank = len(leaf.shape)
    entries: list[MeshAxes] = [*choice.spec, *[None] * (rank - len(choice.spec))]
    sizes = [
        size // parts_of(entry, mesh.shape)
        for size, entry in zip(leaf.shape, entries, strict=True)
    ]
    for first in range(len(free)):
        ways = parts_of(free[first:], mesh.shape)
        fits = [(size, -dim) for dim, size in enumerate(sizes) if size % ways == 0]
        if fits and ways > 1:
            dim = -max(fits)[1]
            entries[dim] = as_entry((*mesh_axes(entries[dim]), *free[first:]))
            return Choice(PartitionSpec(*entries), choice.memory_kind)
    return choice
