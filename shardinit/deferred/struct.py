"""Struct: the base class of models and layers."""

from __future__ import annotations

from typing import Self, final

from shardinit.deferred.node import TreeNode
from shardinit.deferred.selection import Selection, select


class Struct(TreeNode):
    """Base class of pytree dataclasses; decorate subclasses with `pytree_dataclass`.

    Example:
      >>> from shardinit import deferred
      >>> @deferred.pytree_dataclass
      ... class Affine(deferred.Struct):
      ...     scale: float
      ...     shift: float
      >>> affine = Affine(2.0, 1.0)
      >>> affine.select().at(lambda node: node.shift).set(0.0)
      Affine(scale=2.0, shift=0.0)
    """

    @final
    def select(self) -> Selection[Self]:
        """Selects this struct, to select and change parts of a copy.

        Example:
          >>> from shardinit import deferred
          >>> deferred.Parameter(1.0, "scale").select().at_pytree_leaves().get()
          1.0
        """
        return select(self)
