"""Struct: what a model is made of, a tree node that a change may start from."""

from __future__ import annotations

from typing import Self, final

from shardinit.deferred.node import TreeNode
from shardinit.deferred.selection import Selection, select


class Struct(TreeNode):
    """Base class of pytree dataclasses; decorate subclasses with `pytree_dataclass`."""

    @final
    def select(self) -> Selection[Self]:
        """Selects this struct, as the start of a change that copies."""
        return select(self)
