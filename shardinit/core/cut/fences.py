"""Fences: arithmetic that a move keeps apart under plain jit stays apart in a window.

Windows carry moves out on coordinates, so that nothing of them is left between the
arithmetic on both sides. The compiler would join it there, with other last places:
``(x * a)[3:9] * b`` becomes ``x * (a * b)``; a rounding to bfloat16 is dropped before a
cast back (XLA's excess precision: https://github.com/jax-ml/jax/issues/23007); of a
factor that was a truth value it makes a choice; what a loop made is joined with what
follows it.

An ``optimization_barrier`` does not hold: the CPU compiler of JAX 0.10.2 and 0.12.0.1
takes it away before it fuses, and LLVM then contracts a product and a sum across it
(https://github.com/openxla/xla/issues/41579). A *fence* is an exclusive or of the
bits with a zero that no compiler knows to be one (``window/rules/barriers.py``). It
costs one integer operation an element, and no memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from shardinit.core.ir.graph import Node, Subgraph, Value, extract, topological
from shardinit.core.window.rules.rule import FOLDS, MOVES, PICKS
from shardinit.version import release

FENCE = "fence"

# XLA joins no arithmetic across a move that picks elements. Others it moves out of the
# way of factors and shifts, and so joins these; but what no move at all may lie between
# is a dropped rounding, and a mask, of which XLA makes a choice, where a product has
# the sign of its zeros.
_ANY_MOVE = {"rounding", "mask"}
_FAMILIES = {"mul": "factor", "div": "factor", "add": "shift", "sub": "shift"}

# What XLA's CPU compiler expands in other ways in a loop than outside of one (JAX
# 0.12.0.1: up to a third of the elements differ in the last place).
_LOOPED = frozenset("atan cbrt tan".split())
# Of float16 on 0.12.0.1 (0.11 was not tried); on 0.10.2 a scan of them has the bits
# that they have outside of one.
_LOOPED_HALF = frozenset("acosh asinh atanh log1p rsqrt".split())
_HALF_TOO = release(jax.__version__) >= (0, 11)


def looped(values: Sequence[Value]) -> bool:
    """Whether the results of a loop's step have bits that they have in loops alone."""
    return any(
        node.name in _LOOPED
        or (
            _HALF_TOO
            and node.name in _LOOPED_HALF
            and node.outputs[0].dtype == jnp.float16
        )
        for node in topological(values)
    )


def fence(values: Sequence[Value]) -> list[Value]:
    """Each value behind a fence of its own, numbers that are no floats as they are."""
    return [
        Node(FENCE, None, {}, [v], [v]).outputs[0] if _is_float(v) else v
        for v in values
    ]


def fence_moves(graph: Subgraph) -> Subgraph:
    """Puts fences behind the moves between arithmetic that XLA would join."""
    order = topological(graph.outs)
    above = _wanted_by(order)
    below: dict[Value, set[str]] = {}
    fenced = _shared_with_folds(order)
    for node in order:
        made = _families(node)
        fenced.update(_spread_masks(node, below))
        if node.name in MOVES:
            made = _union(below, node.inputs)
            joined = made & _union(above, node.outputs)
            apart = joined & _ANY_MOVE or (joined and node.name in PICKS)
            if apart and not _moves_nothing(node):
                fenced.add(node)
                made = set()
        for value in node.outputs:
            below[value] = made
    if not fenced:
        return graph

    def expand(node: Node, inputs: list[Value]) -> list[Value] | None:
        if node not in fenced:
            return None
        moved = Node(node.name, node.prim, node.params, inputs, node.outputs)
        return fence(moved.outputs)

    return extract(graph.outs, graph.inputs, expand)


def _shared_with_folds(order: Sequence[Node]) -> set[Node]:
    """What makes the floats that an axis is folded of and that are used beside it.

    XLA has one value there, and joins it with neither. In a window the fold reads it at
    coordinates of its own, and all else is free to be joined: ``normal(k) / largest``
    would become ``erf_inv(u) * (sqrt(2) / largest)``.
    """
    users: dict[Node, set[Node]] = {}
    for node in order:
        for made in {v.node for v in node.inputs if v.node is not None}:
            users.setdefault(made, set()).add(node)
    shared: set[Node] = set()
    for fold in order:
        if fold.name in FOLDS:
            inside = {fold, *topological(fold.inputs)}
            shared |= {node for node in inside if users.get(node, set()) - inside}
            shared.discard(fold)
    return {node for node in shared if any(map(_is_float, node.outputs))}


def _moves_nothing(node: Node) -> bool:
    """Whether all elements stay where they are: XLA takes it away."""
    same = node.inputs[0].shape == node.outputs[0].shape
    return same and node.name in ("broadcast_in_dim", "reshape", "slice", "split")


def _spread_masks(node: Node, below: dict[Value, set[str]]) -> list[Node]:
    """What makes the masks that an equation itself spreads along axes of size one."""
    (out, *_) = node.outputs
    spread = [v for v in node.inputs if node.name == "mul" and v.shape != out.shape]
    return [v.node for v in spread if v.node and "mask" in below.get(v, ())]


def _families(node: Node) -> set[str]:
    """What an equation's results are to the arithmetic that may follow."""
    (out, *_) = node.outputs
    if not _is_float(out) or node.name in MOVES or node.name == FENCE:
        return set()
    found = {"rounding"} if _bits(out) < 32 else set()
    if node.name == "convert_element_type" and node.inputs[0].dtype == bool:
        found.add("mask")
    if node.name in _FAMILIES and any(v.size == 1 for v in node.inputs):
        found.add(_FAMILIES[node.name])
    return found


def _wanted_by(order: Sequence[Node]) -> dict[Value, set[str]]:
    """For each value the arithmetic that reads it, through moves."""
    wanted: dict[Value, set[str]] = {}
    for node in reversed(order):
        asked: set[str] = set()
        if node.name in MOVES:
            asked = _union(wanted, node.outputs)
        elif node.name == "convert_element_type":
            value, out = node.inputs[0], node.outputs[0]
            if _is_float(value) and _is_float(out) and _bits(value) < _bits(out):
                asked = {"rounding"}
        elif node.name in _FAMILIES and any(v.size == 1 for v in node.inputs):
            asked = {_FAMILIES[node.name]}
        if node.name == "mul":
            asked = {*asked, "mask"}
        for value in node.inputs:
            wanted.setdefault(value, set()).update(asked)
    return wanted


def _union(families: dict[Value, set[str]], values: Sequence[Value]) -> set[str]:
    return set().union(*(families.get(v, set()) for v in values))


def _is_float(value: Value) -> bool:
    return jnp.issubdtype(value.dtype, jnp.floating)


def _bits(value: Value) -> int:
    return jnp.finfo(value.dtype).bits
