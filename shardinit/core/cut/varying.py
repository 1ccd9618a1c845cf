"""Along which of its axes a value varies, by what it is made of.

XLA treats a factor or a divisor that varies along fewer axes than the other operand as
the broadcast that it is (``reciprocals``, ``factors``). In a window all are made at the
window's place, and nothing of that is left to see.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from shardinit.core.ir.graph import Node, Value
from shardinit.core.window.rules.elementwise import elementwise
from shardinit.core.window.rules.rule import RULES

Axes = frozenset[int]


class Varying:
    """The axes along which the values of a graph vary.

    Args:
      order: the equations, each behind those that make its operands.
    """

    def __init__(self, order: Sequence[Node]):
        self._axes: dict[Value, Axes] = {}
        for node in order:
            self._axes.update((out, self._of_result(node, out)) for out in node.outputs)

    def axes(self, value: Value) -> Axes:
        """The axes along which a value varies; of an operand all that are long."""
        if value not in self._axes:
            known = value.const is not None
            self._axes[value] = (
                _axes_of(np.asarray(value.const)) if known else long_axes(value.shape)
            )
        return self._axes[value]

    def is_narrow(self, value: Value, shape: Sequence[int]) -> bool:
        """Whether an operand of a result of ``shape`` varies along fewer axes."""
        return self.axes(value) < long_axes(shape)

    def _of_result(self, node: Node, out: Value) -> Axes:
        if node.name == "iota":
            return frozenset([node.params["dimension"]])
        if node.name == "broadcast_in_dim":
            places = node.params["broadcast_dimensions"]
            return frozenset(int(places[axis]) for axis in self.axes(node.inputs[0]))
        if RULES.get(node.name) is elementwise:
            return frozenset().union(*map(self.axes, node.inputs))
        return long_axes(out.shape)


def _axes_of(array: np.ndarray) -> Axes:
    return frozenset(
        axis
        for axis in long_axes(array.shape)
        if (array != array.take([0], axis=axis)).any()
    )


def long_axes(shape: Sequence[int]) -> Axes:
    """The axes that have more than one place."""
    return frozenset(axis for axis, size in enumerate(shape) if size > 1)
