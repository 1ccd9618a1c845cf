"""Logical axis rules as Flax means them.

``flax.linen.logical_to_mesh_axes`` walks the *rules*, not the dimensions: each rule
goes to the dimension of its name if that is not settled yet and all of the rule's mesh
axes are free. So an earlier rule wins a mesh axis even for a later dimension, several
rules for one name are alternatives, and a rule that keeps a name whole settles it
wherever it stands. Entries that are no single name (None, several mesh axes at once)
settle their dimension before all rules.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Final

from shardinit.core.init_fn import Name
from shardinit.core.plan.entries import MeshAxes, mesh_axes
from shardinit.errors import ShardingError


class _Unsettled:
    """The state of a dimension that nothing has settled."""


UNSETTLED: Final = _Unsettled()
Fits = Callable[[int, tuple[str, ...]], bool]
Settled = list[MeshAxes | _Unsettled]


def check_distinct(names: Sequence[Name], where: str) -> None:
    """Refuses a logical name that stands twice in one leaf, as Flax does.

    Raises:
      ShardingError: with the name.
    """
    known = [name for name in names if isinstance(name, str)]
    twice = sorted({name for name in known if known.count(name) > 1})
    if twice:
        raise ShardingError(
            where,
            f"the axis name {twice[0]!r} occurs more than once in {tuple(names)}",
            "names that differ, as Flax demands for logical rules",
            "Rename one of the axes in the model",
        )


def assign(
    names: Sequence[Name], rules: Iterable[tuple[str, MeshAxes]], fits: Fits
) -> Settled:
    """What the rules settle: for each dimension mesh axes, None, or UNSETTLED.

    Args:
      names: of the dimensions, the strings among them distinct.
      rules: pairs of logical name and mesh axes, in order of precedence.
      fits: whether a dimension may be cut along mesh axes.
    """
    settled: Settled = [
        UNSETTLED if isinstance(n, str) else mesh_axes_or_none(n) for n in names
    ]
    taken = {axis for entry in settled for axis in _axes(entry)}
    for name, entry in rules:
        if name not in names:
            continue
        dim, wanted = names.index(name), mesh_axes(entry)
        if settled[dim] is UNSETTLED and taken.isdisjoint(wanted) and fits(dim, wanted):
            settled[dim] = entry
            taken.update(wanted)
    return settled


def pass_through(
    names: Sequence[Name], settled: Settled, mesh_names: Collection[str], fits: Fits
) -> Settled:
    """Lets names that are mesh axes themselves, and free, settle their dimensions.

    Args:
      names: of the dimensions; None for those that rules know.
      settled: what rules have settled.
      mesh_names: the axes of the mesh.
      fits: as for ``assign``.
    """
    out = list(settled)
    taken = {axis for entry in settled for axis in _axes(entry)}
    for dim, name in enumerate(names):
        if out[dim] is not UNSETTLED or not isinstance(name, str):
            continue
        if name in mesh_names and name not in taken and fits(dim, (name,)):
            out[dim] = name
            taken.add(name)
    return out


def mesh_axes_or_none(entry: object) -> MeshAxes:
    """An entry that is no single name: several mesh axes, or whole.

    ``PartitionSpec.UNCONSTRAINED`` leaves a dimension to the compiler; a plan has to
    say where it lies, and it lies whole.
    """
    return entry if isinstance(entry, tuple) else None


def _axes(entry: MeshAxes | _Unsettled) -> tuple[str, ...]:
    return () if isinstance(entry, _Unsettled) else mesh_axes(entry)
