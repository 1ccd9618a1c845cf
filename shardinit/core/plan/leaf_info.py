"""A leaf as rules see it, and what they chose for it."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final

from jax.sharding import NamedSharding, PartitionSpec

from shardinit.core.init_fn import AxisRule, Mirror, Name
from shardinit.core.leaf_spec import LeafSpec
from shardinit.core.plan.entries import mesh_axes_of
from shardinit.core.plan.mesh import AnyMesh

WHOLE: Final = PartitionSpec()
LARGE: Final = 1 << 16
"""Bytes of a leaf from which on it matters how it is cut."""


@dataclass(frozen=True)
class LeafInfo(LeafSpec):
    """What rules look at, beside path, shape and dtype.

    Attributes:
      axes: a logical axis name, or None, for each dimension; None if unknown.
      passes: a name without a rule that is a mesh axis means that axis.
      own_rules: logical axis rules that the model attaches to the leaf.
      own_mesh: the mesh on which the model places the leaf.
      named: how many dimensions the model itself named.
      stated: the sharding that the function itself gives the leaf.
      mirrors: the leaf whose placement it takes.
      optimizer: it is state of an optimizer.
    """

    axes: tuple[Name, ...] | None = None
    passes: bool = False
    own_rules: tuple[AxisRule, ...] = ()
    own_mesh: AnyMesh | None = None
    named: int | None = None
    stated: NamedSharding | None = None
    mirrors: Mirror | None = None
    optimizer: bool = False

    @property
    def kind(self) -> tuple[object, ...]:
        """All that rules look at, beside paths; hashable.

        The model's own rules count as they are written: they may hold lists.
        """
        rules, dims = repr(self.own_rules), self.mirrors and self.mirrors.dims
        known = (self.axes, self.passes, rules, self.own_mesh, self.named, dims)
        return (self.shape, self.dtype.itemsize, self.optimizer, self.stated, *known)


class Obstacle(enum.Enum):
    """What keeps an axis from being cut, with its text for people."""

    NO_NAMES = "it has no axis names"
    NO_RULE = "no rule for the axis name {}"
    NO_RULES = "no rule for the axis names {}"
    NO_PATH_RULE = "no path rule matches"
    NO_AXIS_DIVIDES = "no axis of {} divides by any of {}"
    AXIS_UNDIVIDED = "{} of size {} does not divide by {}"


@dataclass(frozen=True)
class Cause:
    """Why an axis lies whole that no rule keeps whole: equal for equal causes.

    Attributes:
      obstacle: what is in the way.
      facts: the names and sizes that its text speaks of.
    """

    obstacle: Obstacle
    facts: tuple[object, ...] = ()

    def __str__(self) -> str:
        return self.obstacle.value.format(*self.facts)


@dataclass(frozen=True)
class Reason:
    """Why an axis of a leaf lies whole, with what would help.

    Attributes:
      cause: why; the same for all leaves that it holds for.
      remedy: what would help the leaf at hand.
    """

    cause: Cause
    remedy: str


@dataclass(frozen=True)
class Choice:
    """Where rules put one leaf, and what kept them from cutting it.

    Attributes:
      spec: the partition spec.
      memory_kind: the kind of memory, None for the device's own.
      reasons: why axes lie whole that no rule keeps whole.
      rules: the rules that this comes from.
    """

    spec: PartitionSpec = WHOLE
    memory_kind: str | None = None
    reasons: tuple[Reason, ...] = ()
    rules: tuple[object, ...] = ()


@dataclass(frozen=True)
class Placed:
    """One leaf, where it lies, what its rules say of it, and whether it is made."""

    leaf: LeafInfo
    sharding: NamedSharding
    choice: Choice
    selected: bool = True

    @property
    def is_replicated(self) -> bool:
        """Whether every device holds all of it."""
        return not mesh_axes_of(self.sharding.spec)
