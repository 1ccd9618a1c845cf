"""A leaf as rules see it, and what they chose for it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from jax.sharding import NamedSharding, PartitionSpec

from shardinit.core.init_fn import AxisRule, Mirror, Name
from shardinit.core.plan.mesh import AnyMesh

WHOLE: Final = PartitionSpec()
LARGE: Final = 1 << 16
"""Bytes of a leaf from which on it matters how it is cut."""


@dataclass(frozen=True)
class LeafInfo:
    """What rules look at.

    Attributes:
      path: the leaf's key path.
      shape: its global shape.
      itemsize: bytes of one element.
      axes: a logical axis name, or None, for each dimension; None if unknown.
      passes: a name without a rule that is a mesh axis means that axis.
      own_rules: logical axis rules that the model attaches to the leaf.
      own_mesh: the mesh on which the model places the leaf.
      named: how many dimensions the model itself named.
      stated: the sharding that the function itself gives the leaf.
      mirrors: the leaf whose placement it takes.
      optimizer: it is state of an optimizer.
    """

    path: str
    shape: tuple[int, ...]
    itemsize: int
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
        return (self.shape, self.itemsize, self.optimizer, self.stated, *known)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole leaf."""
        return math.prod(self.shape) * self.itemsize


@dataclass(frozen=True)
class Reason:
    """Why an axis lies whole that no rule keeps whole.

    Attributes:
      text: the reason, the same for all leaves that it holds for.
      remedy: what would help the leaf at hand.
    """

    text: str
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
