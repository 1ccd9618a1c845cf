"""Windowed evaluation: any window of a leaf, computed alone.

Two sweeps over a leaf program. From the leaf towards the random bits, ``pull`` carries
the coordinates of the wanted elements; from the bits back to the leaf, ``push`` makes
values of them. What derives keys is evaluated whole (it is a few words); what no rule
covers (QR, sorting, gamma, sums along the leaf) makes the program a *whole* one, which
is evaluated entire and then cut (`whole.py`).

On CPU a window is evaluated over flat lanes, in multiples of 128, behind a barrier.
XLA's CPU code for narrow arrays takes other paths with other last places, so a window
must look the same to the compiler wherever it lies and whatever its shape: that is
what makes the bits independent of the mesh. Full lanes are joined with one tail of
128 lanes, which costs no memory. Programs with stacked keys get one row a key, so that
every lane of a row runs with the same key. Elsewhere the window keeps its own axes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax import lax

from shardinit.core.ir import jaxpr as jx
from shardinit.core.ir.graph import Detached, Node, Value, evaluate, topological
from shardinit.core.window import coordinates as crd
from shardinit.core.window import rules

LANES = 128
MIN_ROW_LANES = 512
# Ancestors of keys (the key arrays themselves) are evaluated whole up to this size.
MAX_WHOLE_KEYS = 1 << 24
# So are tables: values of constants alone that are read here and there.
MAX_TABLE = 1 << 20
# An axis is folded (argmax) once an element of the node, or a little more.
MAX_FOLD_REPEATS = 2
# What to use instead of an equation that makes a leaf whole.
ADVICE = {"qr": "shardinit.initializers.orthogonal shards"}


@dataclass(frozen=True)
class Analysis:
    """What windowing a leaf program takes.

    Attributes:
      whole: why the program must be evaluated whole; empty when it can be windowed.
      inputs: the values that are computed whole before the sweeps (keys).
      key_axes: number of leading leaf axes that choose the key.
      even: whether all numbers on the way depend on all axes of the leaf, or on none.
    """

    whole: str
    inputs: tuple[Value, ...] = ()
    key_axes: int = 0
    even: bool = False


def analyse(graph: Detached) -> Analysis:
    """Finds out whether and how the first result of ``graph`` can be windowed."""
    (out,) = graph.outs
    order = topological([out])
    known = _constants(order)
    pulled: set[Value] = {out}
    inputs: dict[Value, None] = {}
    for node in reversed(order):
        wanted = [v for v in node.outputs if v in pulled]
        if not wanted:
            continue
        rule = rules.rule_of(node)
        if rule is not None:
            if rule.folds and out.size > MAX_FOLD_REPEATS * node.outputs[0].size:
                return Analysis(_describe(node))
            tables = [node.inputs[i] for i in rule.table(node)]
            if not all(
                v.const is not None or v in known or (rule.keyed and _of_keys(v, known))
                for v in tables
            ):
                return Analysis(_describe(node))
            pulled.update(v for v in node.inputs if v.const is None)
            pulled.difference_update(tables)
            inputs.update((v, None) for v in tables if v.const is None)
        elif node.name in jx.KEY_DERIVATIONS or known.issuperset(node.outputs):
            inputs.update((v, None) for v in wanted)
        else:
            return Analysis(_describe(_first_unruled(order)))
    inputs.update((v, None) for v in graph.inputs if v in pulled)
    for node in topological(inputs):
        if node.outputs[0] in known:
            if any(v.size > MAX_TABLE for v in node.outputs):
                return Analysis(_describe(node))
            continue
        if any(v.size > MAX_WHOLE_KEYS for v in node.outputs):
            return Analysis(_describe(node))
        if node.name not in jx.KEY_DERIVATIONS and rules.rule_of(node) is None:
            return Analysis(_describe(node))
    found = Analysis("", tuple(inputs))
    return replace(found, **_probe(graph, found))


def _of_keys(value: Value, known: set[Value]) -> bool:
    """Whether a value is an operand, or derived from operands as keys are."""
    return all(
        node.name in jx.KEY_DERIVATIONS or known.issuperset(node.outputs)
        for node in topological([value])
    )


def _constants(order: Sequence[Node]) -> set[Value]:
    """Values that no operand reaches: the same for every key."""
    known: set[Value] = set()
    for node in order:
        if all(v.const is not None or v in known for v in node.inputs):
            known.update(node.outputs)
    return known


def _first_unruled(order: Sequence[Node]) -> Node:
    """The equation nearest to the random bits that no rule covers."""
    return next(
        node
        for node in order
        if node.name not in jx.KEY_DERIVATIONS and rules.rule_of(node) is None
    )


def _describe(node: Node) -> str:
    if node.name == "random_bits":
        return f"random_bits of {jx.key_impl(node.inputs[0].dtype)} keys"
    shapes = ", ".join(str(list(v.shape)) for v in node.inputs[:2])
    what = f"{node.name} of {shapes}" if shapes else node.name
    return f"{what}; {ADVICE[node.name]}" if node.name in ADVICE else what


def _probe(graph: Detached, analysis: Analysis) -> dict[str, Any]:
    """Which leading axes of the leaf choose the key, if rows pay; and evenness.

    Found by running the sweeps abstractly on a grid of two a side: what depends on an
    axis is wide along it.
    """
    (out,) = graph.outs
    seen: set[int] = set()
    uneven = False

    def probe(*operands: Any) -> Any:
        nonlocal uneven
        sweep = _Sweep(graph, analysis, operands)
        grid = axes_grid([crd.ZERO] * out.ndim, (2,) * out.ndim)
        value = sweep.run(grid)
        for coords in sweep.key_coords:
            for coord in coords:
                seen.update(i for i, n in enumerate(np.shape(coord)) if n != 1)
        uneven = any(1 < math.prod(n) < 1 << out.ndim for n in sweep.numbers)
        return value

    jax.eval_shape(
        probe, *(jax.ShapeDtypeStruct(v.shape, v.dtype) for v in graph.inputs)
    )
    rows = len(seen)
    is_prefix = seen == set(range(rows))
    pays = is_prefix and math.prod(out.shape[rows:]) >= LANES
    return {"key_axes": rows if pays else 0, "even": not uneven}


# ---- grids -------------------------------------------------------------------------


def axes_grid(start: Sequence[Any], shape: Sequence[Any]) -> crd.Coords:
    """Coordinates of a window along its own axes."""
    rank = len(shape)
    coords = []
    for axis, size in enumerate(shape):
        dims = tuple(size if a == axis else 1 for a in range(rank))
        line = lax.broadcasted_iota(np.uint32, dims, axis)
        coords.append(line + crd.u32(start[axis]))
    return tuple(coords)


def lanes_grid(
    start: Sequence[Any],
    shape: Sequence[Any],
    leaf: Sequence[int],
    rows: int,
    first: Any,
    count: Any,
) -> crd.Coords:
    """Coordinates of ``count`` flat lanes of a window of a leaf, from ``first`` on.

    With ``rows`` leading axes apart the grid is (product of those, count), otherwise
    it is flat.
    """
    if rows:
        height = math.prod(shape[:rows])
        row = lax.broadcasted_iota(np.uint32, (height, 1), 0)
        lane = lax.broadcasted_iota(np.uint32, (1, count), 1)
    else:
        row, lane = crd.ZERO, lax.iota(np.uint32, count)
    lane = lane + crd.u32(first)
    across = crd.unravel(lane, shape[rows:])
    long = [axis for axis, size in enumerate(leaf[rows:]) if size > 1]
    if long and all(isinstance(n, int) and n == 1 for n in shape[rows:]):
        # One element. Lanes that are all the same would be scalars to the compiler,
        # which has other rules for them, so the others are of its neighbours.
        across[long[-1]] = lane
    places = [*crd.unravel(row, shape[:rows]), *across]
    return tuple(
        lax.add(*crd.spread([p, s])) for p, s in zip(places, start, strict=True)
    )


# ---- the two sweeps ----------------------------------------------------------------


class _Sweep:
    """Evaluates the first result of a graph at coordinates, any number of times."""

    def __init__(self, graph: Detached, analysis: Analysis, operands: Sequence[Any]):
        (self._out,) = graph.outs
        known = dict(zip(graph.inputs, operands, strict=True))
        whole = [
            # Computed tables look the same to the compiler in every window.
            made if v in known or jx.is_key(v.dtype) else lax.optimization_barrier(made)
            for v, made in zip(
                analysis.inputs, evaluate(analysis.inputs, known), strict=True
            )
        ]
        self._whole = dict(zip(analysis.inputs, whole, strict=True))
        self._order = topological([self._out], self._whole)
        self.key_coords: list[crd.Coords] = []
        self.numbers: list[tuple[Any, ...]] = []  # shapes of what was made of them

    def _later(self, value: Value) -> Callable[[crd.Coords], Any]:
        """The value at coordinates that only the way up can say."""
        if value.const is not None or value in self._whole:
            source = self._whole.get(value, value.const)
            return lambda at: self._gather(source, value, at)
        below = copy.copy(self)
        below._out, below._order = value, topological([value], self._whole)
        return below.run

    def run(self, coords: crd.Coords) -> Any:
        """The value at ``coords``, broadcastable to the grid's shape."""
        demands: dict[Value, dict[tuple[int, ...], crd.Coords]] = {}

        def demand(value: Value, at: crd.Coords) -> None:
            demands.setdefault(value, {})[tuple(map(id, at))] = at

        demand(self._out, tuple(coords))
        pulls: dict[tuple[Value, tuple[int, ...]], Any] = {}
        for node in reversed(self._order):
            rule = rules.RULES[node.name]
            for which, out in enumerate(node.outputs):
                for name, at in demands.get(out, {}).items():
                    pulled = rule.pull(node, which, at)
                    pulls[out, name] = pulled
                    for value, inner in zip(node.inputs, pulled, strict=True):
                        if inner is not None:
                            demand(value, inner)
        return self._push(demands, pulls)[self._out, tuple(map(id, coords))]

    def _push(self, demands: Any, pulls: Any) -> dict[Any, Any]:
        values: dict[tuple[Value, tuple[int, ...]], Any] = {}
        for value, places in demands.items():
            if value.const is not None or value in self._whole:
                source = self._whole.get(value, value.const)
                for name, at in places.items():
                    values[value, name] = self._gather(source, value, at)
        for node in self._order:
            rule = rules.RULES[node.name]
            for which, out in enumerate(node.outputs):
                for name, at in demands.get(out, {}).items():
                    args = [
                        None if inner is None else values[v, tuple(map(id, inner))]
                        for v, inner in zip(node.inputs, pulls[out, name], strict=True)
                    ]
                    for i in rule.table(node):
                        v = node.inputs[i]
                        args[i] = self._whole.get(v, v.const)
                    for i in rule.later:
                        args[i] = self._later(node.inputs[i])
                    values[out, name] = rule.push(node, which, at, args)
        self.numbers += [
            np.shape(made)
            for (value, _), made in values.items()
            if jax.numpy.issubdtype(value.dtype, np.inexact)
        ]
        return values

    def _gather(self, source: Any, value: Value, at: crd.Coords) -> Any:
        if jx.is_key(value.dtype):
            self.key_coords.append(at)
        if value.ndim == 0 and not jx.is_key(value.dtype):
            return source
        return rules.elements(source, value, at)


# ---- windows -----------------------------------------------------------------------


def evaluate_window(
    graph: Detached,
    analysis: Analysis,
    operands: Sequence[Any],
    start: Sequence[Any],
    shape: Sequence[Any],
    *,
    lanes: bool,
) -> Any:
    """One window of a windowed program's leaf.

    Args:
      graph: the leaf program.
      analysis: of that program; ``whole`` must be empty.
      operands: the program's operands, keys as typed keys.
      start: uint32 scalars, where the window begins along each axis.
      shape: the window's shape; sizes may be symbolic dimensions.
      lanes: evaluate over flat lanes (CPU) instead of the window's own axes.

    Returns:
      The window, with the leaf's dtype.
    """
    (out,) = graph.outs
    if any(isinstance(n, int) and n == 0 for n in shape):
        return lax.full(shape, 0, out.dtype)
    sweep = _Sweep(graph, analysis, operands)
    if not lanes:
        return crd.spread_to(sweep.run(axes_grid(start, shape)), shape)
    rows = _rows(analysis, shape)
    count = math.prod(shape[rows:])
    height = (math.prod(shape[:rows]),) if rows else ()

    def at(first: Any, lanes_count: Any) -> Any:
        grid = lanes_grid(start, shape, out.shape, rows, first, lanes_count)
        return crd.spread_to(sweep.run(grid), (*height, lanes_count))

    full = count // LANES * LANES
    static = isinstance(count, int)
    if static and full == count:
        flat = at(0, count)
    else:
        # The tail is always a whole vector of lanes, cut after the barrier, so that
        # the compiler sees the same code for the last elements as for all others.
        tail = lax.optimization_barrier(at(full, LANES))
        flat = lax.slice_in_dim(tail, 0, count - full, axis=len(height))
        if not (static and full == 0):
            flat = lax.concatenate([at(0, full), flat], len(height))
    return lax.reshape(lax.optimization_barrier(flat), tuple(shape))


def _rows(analysis: Analysis, shape: Sequence[Any]) -> int:
    """How many leading axes stand apart from the lanes.

    Those that choose the key do, and more where what is left still fills whole
    vectors: then no lane has to be divided into coordinates. Not so beside numbers
    that depend on some axes only (a row that the leaf is multiplied by): they would be
    narrower than the grid, and XLA moves scalar factors to what is narrow.
    """
    least = analysis.key_axes
    if not analysis.even or not all(isinstance(n, int) for n in shape):
        return least
    for rows in range(len(shape) - 1, least, -1):
        count = math.prod(shape[rows:])
        if count % LANES == 0 and count >= MIN_ROW_LANES:
            return rows
    return least
