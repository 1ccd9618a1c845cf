"""Whether and how a leaf program can be windowed, found by trying it abstractly.

The evaluator runs once on a grid of two a side, with shapes in place of arrays. What it
asks for in full has to be there before any window is evaluated; what depends on an axis
is wide along it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from shardinit.core.ir import jaxpr as jx
from shardinit.core.ir.dependencies import stand_in
from shardinit.core.ir.graph import Node, Subgraph, Value, topological
from shardinit.core.types import Coords, Elements, Values
from shardinit.core.window import coordinates as crd
from shardinit.core.window.evaluator import Evaluator, shape_of
from shardinit.core.window.grids import LANES, axes_grid
from shardinit.core.window.reasons import (
    NotWindowable,
    Reason,
    ReplicatedReason,
    require,
)
from shardinit.core.window.rules import RULES
from shardinit.core.window.rules.rule import FOLDS, Full, Later, Steps

# Ancestors of keys (the key arrays themselves) are made in full up to this size.
MAX_WHOLE_KEYS = 1 << 24
# So are tables: values of constants alone that are read here and there.
MAX_TABLE = 1 << 20
# An axis is read (argmax) once an element of the node, or a little more; beyond it the
# window makes its part of the node beforehand.
MAX_AXIS_REPEATS = 2
# A value that is wanted at many coordinates is made as often. Few graphs share so much;
# an associative scan reads every element at a power of its length.
MAX_READS_A_NODE = 32
# Bits drawn again are a hundred operations and more (threefry2x32 has twenty rounds).
READS_A_DRAW = 100
# What to use instead of an equation that no rule covers.
ADVICE = {"qr": "shardinit.initializers.orthogonal shards"}


Axes = tuple[int | None, ...]


@dataclass(frozen=True)
class Analysis:
    """What windowing a leaf program takes.

    Attributes:
      replicated_reason: why every device computes all of the leaf; None if windowed.
      inputs: the values that are made in full before any window (keys, tables).
      parts: the values of which a window makes its part before anything else, in that
        order, each with the axes of the leaf that its own axes are (None: of size one).
      key_axes: number of leading leaf axes that choose the key.
      even: whether all numbers on the way depend on all axes of the leaf, or on none.
    """

    replicated_reason: ReplicatedReason | None
    inputs: tuple[Value, ...] = ()
    parts: tuple[tuple[Value, Axes], ...] = ()
    key_axes: int = 0
    even: bool = False


def analyse(graph: Subgraph) -> Analysis:
    """Finds out whether and how the first result of ``graph`` can be windowed."""
    (out,) = graph.outs
    order = topological([out])
    constants = constants_among(order)
    trial = _Trial(graph, order, constants)
    try:
        require(not jx.is_key(out.dtype))  # of keys a rule gives the words alone
        # The zero of ``evaluate`` is none at the last place of such an axis.
        require(not out.shape or out.shape[0] < 1 << 32 or not _has_fences(order))
        trial.run()
        _require_small(trial, constants)
    except NotWindowable as error:
        node = trial.node
        if error.reason is Reason.NO_RULE:
            node = _first_uncovered(order) or node
        often = ", read too often" if error.reason is Reason.MANY_READS else ""
        return Analysis(ReplicatedReason(error.reason, _describe(node) + often))
    return _found(trial, graph, order)


def _found(trial: _Trial, graph: Subgraph, order: Sequence[Node]) -> Analysis:
    """How a leaf program is windowed, by what was noted."""
    (out,) = graph.outs
    rows = len(trial.key_axes)
    is_prefix = trial.key_axes == set(range(rows))
    # Each row of lanes is padded to whole vectors: short rows would be mostly padding.
    pays = is_prefix and math.prod(out.shape[rows:]) >= LANES
    inputs = [*trial.full, *(v for v in graph.inputs if v in trial.read)]
    made = [v for node in order for v in node.outputs if v in trial.parts]
    return Analysis(
        None,
        tuple(dict.fromkeys(inputs)),
        tuple((v, trial.parts[v]) for v in made),
        rows if pays else 0,
        not trial.uneven,
    )


def _has_fences(order: Sequence[Node]) -> bool:
    return any(node.name == "fence" for node in order)


def covered(nodes: Iterable[Node]) -> bool:
    """Whether each equation has a rule that covers it, or derives keys."""
    return _first_uncovered(nodes) is None


def constants_among(order: Sequence[Node]) -> set[Value]:
    """Results that no operand reaches: the same for every key."""
    known: set[Value] = set()
    for node in order:
        if all(v.const is not None or v in known for v in node.inputs):
            known.update(node.outputs)
    return known


class _Trial(Evaluator):
    """The evaluator without arrays: it notes what it is asked for.

    Attributes:
      full: what has to be there in full, as far as it is none of the operands.
      read: the operands that are read.
      parts: what a window makes its part of beforehand, with the grid's axes.
      node: the equation that was looked at last.
      key_axes: the axes of the grid that choose keys.
      uneven: whether a number depends on some axes of the grid only.
    """

    def __init__(self, graph: Subgraph, order: Sequence[Node], constants: set[Value]):
        super().__init__({})
        (self._out,) = graph.outs
        self._operands = set(graph.inputs)
        self._constants = constants
        self._left = MAX_READS_A_NODE * (len(order) + LANES)
        self.full: dict[Value, None] = {}
        self.read: dict[Value, None] = {}
        self.parts: dict[Value, Axes] = {}
        self._grid: Coords = ()
        self.node = order[-1] if order else None
        self.key_axes: set[int] = set()
        self.uneven = False

    def run(self) -> None:
        """Tries the first result on a grid of two a side."""
        rank = self._out.ndim

        def window() -> Values:
            self._grid = axes_grid([crd.ZERO] * rank, (2,) * rank)
            return self.at(self._out, self._grid)

        jax.eval_shape(window)

    def _begin(self, value: Value, coords: Coords) -> Steps:
        self.node = value.node
        is_draw = self.node is not None and self.node.name == "random_bits"
        self._left -= READS_A_DRAW if is_draw else 1
        require(self._left > 0, Reason.MANY_READS)
        return super()._begin(value, coords)

    def _is_there(self, value: Value) -> bool:
        if value.const is not None or value in self._operands or value in self.full:
            return True
        node = value.node
        assert node is not None
        if node.name in jx.KEY_DERIVATIONS:
            return True
        return value in self._constants and (node.name in FOLDS or not covers(node))

    def _array(self, value: Value) -> Values:
        if value.const is not None:
            return value.const
        (self.read if value in self._operands else self.full)[value] = None
        return stand_in(value)

    def _read(self, value: Value, coords: Coords) -> Elements:
        if jx.is_key(value.dtype):
            for coord in coords:
                self.key_axes.update(
                    axis for axis, size in enumerate(np.shape(coord)) if size != 1
                )
        return super()._read(value, coords)

    def _other(
        self, node: Node, request: Full | Later, coords: Coords
    ) -> Values | Callable[[Coords], Elements]:
        self.node = node
        value = node.inputs[request.number]
        if isinstance(request, Later):
            repeats = self._out.size > MAX_AXIS_REPEATS * node.outputs[0].size
            if request.reads_axis and repeats:
                self._note_part(node, coords)
        else:
            of_keys = request.of_keys and self._of_keys(value)
            require(of_keys or self._is_constant(value), Reason.DRAWN_TABLE)
        return super()._other(node, request, coords)

    def _note_part(self, node: Node, coords: Coords) -> None:
        """Notes what a window makes its part of: its axes are some of the window's."""
        lines = {id(line): axis for axis, line in enumerate(self._grid)}
        axes = tuple(lines.get(id(coord)) for coord in coords)
        named = [axis for axis in axes if axis is not None]
        out = node.outputs[0]
        alone = all(
            axis is not None or size == 1
            for axis, size in zip(axes, out.shape, strict=True)
        )
        alike = self.parts.setdefault(out, axes) == axes
        require(alone and alike and len(named) == len(set(named)), Reason.AXIS_AGAIN)

    def _is_constant(self, value: Value) -> bool:
        return value.const is not None or value in self._constants

    def _of_keys(self, value: Value) -> bool:
        """Whether a value is an operand, or derived from operands as keys are."""
        return all(
            node.name in jx.KEY_DERIVATIONS or self._constants.issuperset(node.outputs)
            for node in topological([value])
        )

    def _note(self, value: Value, made: Elements) -> None:
        if jax.numpy.issubdtype(value.dtype, np.inexact):
            width = math.prod(shape_of(made))
            self.uneven |= 1 < width < 1 << self._out.ndim


def _require_small(trial: _Trial, constants: set[Value]) -> None:
    """What is there in full has to be small, and made by what can be made in full."""
    for node in topological(trial.full):
        trial.node = node
        is_constant = constants.issuperset(node.outputs)
        limit = MAX_TABLE if is_constant else MAX_WHOLE_KEYS
        require(all(v.size <= limit for v in node.outputs), Reason.LARGE_TABLE)
        require(is_constant or covered([node]))


def _first_uncovered(order: Iterable[Node]) -> Node | None:
    """The equation nearest to the random bits that no rule covers."""
    for node in order:
        if node.name not in jx.KEY_DERIVATIONS and not covers(node):
            return node
    return None


def covers(node: Node) -> bool:
    """Whether a rule covers an equation: it asks for something, or has its result."""
    if node.name not in RULES or node.outputs[0].size == 0:
        return False

    def begin() -> None:
        out = node.outputs[0]
        coords = axes_grid([crd.ZERO] * out.ndim, (2,) * out.ndim)
        next(RULES[node.name](node, 0, coords), None)

    try:
        jax.eval_shape(begin)
    except NotWindowable:
        return False
    return True


def _describe(node: Node | None) -> str:
    if node is None:
        return "a result"
    if node.name == "random_bits":
        return f"random_bits of {jx.key_impl(node.inputs[0].dtype)} keys"
    shapes = ", ".join(str(list(v.shape)) for v in node.inputs[:2])
    what = f"{node.name} of {shapes}" if shapes else node.name
    return f"{what}; {ADVICE[node.name]}" if node.name in ADVICE else what
