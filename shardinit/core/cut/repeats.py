"""Leaves of one value that one key drew twice.

A key that is used again gives the same numbers again. Leaves that share the draw itself
(tied weights, a moving average that begins as the weights) have one value on purpose;
those of equal programs and equal keys that share nothing of the graph do not.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from shardinit.core.cut.sources import Run, Source
from shardinit.core.ir.graph import Value, topological
from shardinit.core.prng import derivation as keys


def repeated_draws(
    sources: Sequence[Source], outs: Sequence[Value]
) -> tuple[tuple[int, ...], ...]:
    """Groups of leaves, by number, that were drawn more than once from one key.

    Args:
      sources: where each leaf comes from.
      outs: each leaf in the traced graph.
    """
    same, drawn = _equal_keys(sources)
    groups: dict[tuple[Hashable, tuple[int, ...]], list[int]] = {}
    for number, source in enumerate(sources):
        # A constant has operands too, its number; no key reaches it.
        if not isinstance(source, Run):
            continue
        operands = tuple(same[id(d)] for d in source.operands)
        if not drawn.isdisjoint(operands):
            groups.setdefault((source.computation, operands), []).append(number)
    return tuple(
        apart
        for group in groups.values()
        if len(group) > 1
        if len(apart := _apart(group, outs)) > 1
    )


def _equal_keys(sources: Sequence[Source]) -> tuple[dict[int, int], set[int]]:
    """A number for each derivation, the same for those of one value.

    Returns:
      The numbers by the derivations' identities, and those of them that the root key
      reaches.
    """
    numbers: dict[Hashable, int] = {}
    same: dict[int, int] = {}
    drawn: set[int] = set()
    for node in keys.topological(d for source in sources for d in source.operands):
        parents = tuple(same[id(parent)] for parent in node.parents)
        what = (node.op, node.impl, node.words, parents, node.shape)
        number = numbers.setdefault((*what, node.data.tobytes()), len(numbers))
        same[id(node)] = number
        if node.op == "root" or not drawn.isdisjoint(parents):
            drawn.add(number)
    return same, drawn


def _apart(group: Sequence[int], outs: Sequence[Value]) -> tuple[int, ...]:
    """The leaves of a group whose graphs have nothing in common with those before."""
    seen: set[int] = set()
    apart = []
    for number in group:
        nodes = {id(node) for node in topological([outs[number]])}
        if seen.isdisjoint(nodes):
            apart.append(number)
        seen |= nodes
    return tuple(apart)
