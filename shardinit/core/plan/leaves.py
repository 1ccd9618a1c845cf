"""The leaves of a plan and the executables that make them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
from jax.sharding import NamedSharding

from shardinit.core.cut.cut import Cut, LeafCut
from shardinit.core.cut.leaf_program import Program
from shardinit.core.cut.sources import Hosted, Replicated, Source, Windowed
from shardinit.core.init_fn import AxisNames, Mirror, Name
from shardinit.core.leaf_spec import LeafSpec
from shardinit.core.plan.entries import other_memory
from shardinit.core.plan.leaf_info import LeafInfo
from shardinit.core.types import Tree
from shardinit.errors import ShardingError
from shardinit.short import plural

_NO_PROGRAM = -1

Names = Sequence[Name] | None
"""The axis names of a leaf as a front end gives them; None where none are known."""


@dataclass(frozen=True)
class PlanLeaf(LeafSpec):
    """One leaf of a plan: its path, shape and dtype, and what becomes of it.

    Attributes:
      sharding: where it lies; None in a plan without a mesh.
      bytes_per_device: bytes of one shard, in whichever memory it lies.
      program: index into ``plan.programs``; -1 for a leaf made on the host (a
        constant, or keys), and for one that ``select`` left out.
      whole: why every device computes the full leaf; empty when it computes its shard.
      selected: False for a leaf that ``select`` left out.
      source: what it is made of.
    """

    sharding: NamedSharding | None
    bytes_per_device: int
    program: int
    whole: str
    selected: bool
    # Sources are equal by identity: no leaf of a plan would equal that of the next plan
    # of the same function.
    source: Source = field(repr=False, compare=False)

    @property
    def is_hosted(self) -> bool:
        """Whether it is there on the host before anything runs: a constant, or keys."""
        return isinstance(self.source, Hosted)

    @property
    def memory_kind(self) -> str:
        """Memory that it lies in, such as "pinned_host"; "" for the device's own."""
        return other_memory(self.sharding)

    @property
    def is_replicated(self) -> bool:
        """Whether a program computes all of it on every device."""
        return isinstance(self.source, Replicated)


@dataclass(frozen=True, eq=False)
class PlanProgram:
    """One executable: a leaf program at a sharding.

    Attributes:
      program: what it computes.
      shapes: global shape of each result.
      shardings: of each result; None in a plan without a mesh.
      leaves: how many leaves (or groups of leaves with one whole program) it makes.
    """

    program: Program
    shapes: tuple[tuple[int, ...], ...]
    shardings: tuple[NamedSharding | None, ...]
    leaves: int

    def __repr__(self) -> str:
        places = ", ".join(
            f"{shape} at {getattr(sharding, 'spec', None)}"
            for shape, sharding in zip(self.shapes, self.shardings, strict=True)
        )
        return f"<PlanProgram for {plural(self.leaves, 'leaf')}: {places[:300]}>"

    @property
    def whole(self) -> str:
        """Why it is evaluated whole on every device; empty if it is not."""
        return str(self.program.replicated_reason or "")


def names_of(cut: Cut, axes: Tree) -> list[Names]:
    """The axis names of each leaf, None where none are known.

    In ``axes`` None also stands for a whole subtree of which no name is known.

    Raises:
      ShardingError: the structure of ``axes`` is not the result's.
    """
    names: list[Names] = [None] * len(cut.leaves)
    try:
        # A list and no recursion: a tree may be deeper than Python's stack.
        waiting = [(axes, jax.tree.unflatten(cut.tree, range(len(cut.leaves))))]
        while waiting:
            given, part = waiting.pop()
            if isinstance(part, int):
                names[part] = given
            elif given is not None:
                children, level = jax.tree.flatten(part, is_leaf=_is_below(part))
                waiting += zip(level.flatten_up_to(given), children, strict=True)
        return names
    except (ValueError, TypeError) as error:
        raise ShardingError(
            "InitFn.axes",
            f"its structure differs from the result's ({error})"[:300],
            f"a tuple of axis names, or None, for each of the {len(cut.leaves)} leaves",
        ) from error


def _is_below(top: Tree) -> Callable[[Tree], bool]:
    """Stops a flattening one level below ``top``."""
    return lambda node: node is not top


def leaf_infos(cut: Cut, axes: Tree) -> list[LeafInfo]:
    """What sharding rules look at, one for each leaf; checks the axis names."""
    names = names_of(cut, axes)
    stated = cut.stated or [None] * len(cut.leaves)
    infos = list(map(_leaf_info, cut.leaves, names, stated))
    by_path = {info.path: info for info in infos}
    return [
        info if info.mirrors is None else _with_names(info, info.mirrors, by_path)
        for info in infos
    ]


def _with_names(
    info: LeafInfo, mirror: Mirror, by_path: Mapping[str, LeafInfo]
) -> LeafInfo:
    """A leaf that mirrors another one with that one's names for the axes it has."""
    source = by_path.get(mirror.path)
    if source is None:
        return replace(info, mirrors=None)
    if source.axes is None:
        return info
    axes = [None if dim is None else source.axes[dim] for dim in mirror.dims]
    return replace(
        info,
        axes=tuple(axes),
        passes=source.passes,
        own_rules=source.own_rules,
        own_mesh=source.own_mesh,
        named=None,
    )


def _leaf_info(leaf: LeafCut, name: Names, stated: NamedSharding | None) -> LeafInfo:
    if name is not None and len(name) != len(leaf.shape):
        raise ShardingError(
            f"leaf {leaf.path!r}",
            f"axis names {name} for the shape {leaf.shape}",
            "one name (or None) for each dimension",
        )
    axes = None if name is None else tuple(map(_entry, name))
    known = {} if not isinstance(name, AxisNames) else name.facts()
    return LeafInfo(leaf.path, leaf.shape, leaf.dtype, axes, stated=stated, **known)


def _entry(name: Name | list[str]) -> Name:
    """The name of one axis; several mesh axes may be written as a list."""
    return tuple(name) if isinstance(name, list) else name


def plan_leaves(
    cut: Cut, shardings: Sequence[NamedSharding | None], picked: Sequence[bool]
) -> tuple[tuple[PlanLeaf, ...], tuple[PlanProgram, ...]]:
    """All leaves where their shardings put them, and what makes those picked."""
    programs, numbers = group_programs(cut, shardings, picked)
    leaves = tuple(
        _plan_leaf(leaf, cut, sharding, number, taken)
        for leaf, sharding, number, taken in zip(
            cut.leaves, shardings, numbers, picked, strict=True
        )
    )
    return leaves, programs


def group_programs(
    cut: Cut, shardings: Sequence[NamedSharding | None], picked: Sequence[bool]
) -> tuple[tuple[PlanProgram, ...], list[int]]:
    """Leaf programs by sharding: what is compiled, and which leaf uses which.

    A program with several results is compiled when any of its leaves is selected.
    """
    numbers = [_NO_PROGRAM] * len(cut.leaves)
    found: dict[Any, int] = {}
    programs: list[list[Any]] = []
    for together in gather_results(cut):
        if not any(picked[i] for i in together):
            continue
        index = cut.run_of(together[0]).program
        places = tuple(shardings[i] for i in together)
        shapes = tuple(cut.leaves[i].shape for i in together)
        kind = (index, shapes, places)
        if kind not in found:
            found[kind] = len(programs)
            programs.append([cut.programs[index], shapes, places, 0])
        programs[found[kind]][3] += 1
        for i in together:
            numbers[i] = found[kind]
    return tuple(PlanProgram(*p) for p in programs), numbers


def gather_results(cut: Cut) -> list[list[int]]:
    """Leaves made by one run of one program together, in the order of its results."""
    groups: list[list[int]] = []
    waiting: dict[Any, list[int]] = {}
    for number, leaf in enumerate(cut.leaves):
        source = leaf.source
        if isinstance(source, Windowed):
            groups.append([number])
        if not isinstance(source, Replicated):
            continue
        run = (source.program, source.operands)
        group = waiting.get(run)
        if group is None or source.result == 0:
            group = waiting[run] = []
            groups.append(group)
        group.append(number)
    return groups


def _plan_leaf(
    leaf: LeafCut,
    cut: Cut,
    sharding: NamedSharding | None,
    number: int,
    taken: bool,
) -> PlanLeaf:
    """One leaf where its sharding puts it.

    Args:
      leaf: the leaf of the cut function.
      cut: that function.
      sharding: where the leaf lies.
      number: of its executable, -1 for none.
      taken: whether ``select`` takes it.
    """
    shard = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
    return PlanLeaf(
        leaf.path,
        leaf.shape,
        leaf.dtype,
        sharding,
        math.prod(shard) * leaf.dtype.itemsize,
        number,
        cut.replicated_text(leaf),
        taken,
        leaf.source,
    )
