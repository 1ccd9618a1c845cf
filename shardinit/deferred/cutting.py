"""Marks at the nodes of a tree that are selected, and the parts of a partition.

JAX does not know the type of a mark, so a marked tree flattens into the marks and the
leaves outside them; a selection is made from this. A partition consists of two trees,
in each of which a `NotInThisPartition` replaces the nodes that are in the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax

from shardinit.core.paths import path_str
from shardinit.deferred.dataclass import pytree_dataclass
from shardinit.deferred.node import TreeNode, one_level
from shardinit.errors import SelectionError

KeyPath = tuple[Any, ...]


class Mark:
    """Wraps a node that is to be selected; JAX treats it as a leaf."""

    __slots__ = ("node",)

    def __init__(self, node: Any):
        self.node = node


def is_mark(node: Any) -> bool:
    """Whether a node is marked."""
    return isinstance(node, Mark)


def mark_where(node: Any, path: KeyPath, test: Callable[[KeyPath, Any], bool]) -> Any:
    """Marks the outermost nodes for which ``test(path, node)`` holds."""
    if test(path, node):
        return Mark(node)
    level = one_level(node)
    if level is None:
        return node
    children, treedef = level
    return treedef.unflatten(
        [mark_where(child, (*path, key), test) for key, child in children]
    )


def mark_innermost(
    node: Any, path: KeyPath, test: Callable[[KeyPath, Any], bool]
) -> Any:
    """Marks the innermost nodes for which ``test(path, node)`` holds."""
    return _innermost(node, path, test)[0]


def _innermost(
    node: Any, path: KeyPath, test: Callable[[KeyPath, Any], bool]
) -> tuple[Any, bool]:
    """Returns the marked node, and whether there is a mark in it."""
    children, treedef = one_level(node) or ([], None)
    inner = [_innermost(child, (*path, key), test) for key, child in children]
    if treedef is not None and any(found for _, found in inner):
        return treedef.unflatten([child for child, _ in inner]), True
    return (Mark(node), True) if test(path, node) else (node, False)


def inlined(
    node: Any, path: KeyPath, fn: Callable[[KeyPath, Any], Iterable[Any]]
) -> Any:
    """Replaces each marked item of a list or tuple by the items ``fn`` returns for it.

    Raises:
      SelectionError: a marked node is no item of a list or tuple.
    """
    if is_mark(node):
        raise SelectionError(
            f"Selection.apply_and_inline at {path_str(path)!r}",
            "it is selected and no item of a list or tuple",
            "only items of lists and tuples",
            "A node in another place has no neighbours; apply() replaces it",
        )
    level = one_level(node)
    if level is None:
        return node
    children, treedef = level
    # A named tuple has as many items as fields: none can be put in or left out.
    sequence = isinstance(node, list | tuple) and not hasattr(node, "_fields")
    new: list[Any] = []
    for key, child in children:
        here = (*path, key)
        if sequence and is_mark(child):
            new.extend(fn(here, child.node))
        else:
            new.append(inlined(child, here, fn))
    return type(node)(new) if sequence else treedef.unflatten(new)


def mark_picked(node: Any, accessor_fn: Callable[[Any], Any], multiple: bool) -> Any:
    """Marks the node, or the nodes, that an accessor returns for a tree.

    Raises:
      SelectionError: the accessor returned something that is not a node of the tree.
    """
    # Each leaf in an object of its own: 1 in two places is one object, and its id would
    # not say which of them was picked.
    copy = jax.tree.map(Mark, node, is_leaf=is_childless)
    picked = accessor_fn(copy)
    # With the objects themselves: what an accessor makes on the way would be freed, and
    # its id given to a node of the tree.
    wanted = {id(p): p for p in (picked if multiple else [picked])}
    parts, treedef = jax.tree.flatten(copy, is_leaf=lambda x: id(x) in wanted)
    found = {id(part) for part in parts}
    for number, part in wanted.items():
        if number not in found:
            raise SelectionError(
                "Selection.at",
                f"the accessor returned {part!r}",
                f"{'several nodes' if multiple else 'a node'} of the tree it was given",
                "To pick several nodes pass multiple=True; what is static in a "
                "struct is no node",
            )
    bare = [jax.tree.map(lambda leaf: leaf.node, part) for part in parts]
    pairs = zip(parts, bare, strict=True)
    return treedef.unflatten(
        [Mark(node) if id(part) in wanted else node for part, node in pairs]
    )


def is_childless(node: Any) -> bool:
    """Whether a node is a leaf, or has no children, as an empty list."""
    level = one_level(node)
    return level is None or not level[0]


@pytree_dataclass
class NotInThisPartition(TreeNode):
    """Placeholder of a subtree that is in the other tree of a partition.

    Example:
      >>> from shardinit import deferred
      >>> rest = deferred.select([1, 2.5]).at_instances_of(int).set(
      ...     deferred.NotInThisPartition()
      ... )
      >>> rest
      [NotInThisPartition(), 2.5]
    """


def combine(*trees: Any) -> Any:
    """Combines the trees that `Selection.partition` returned into one.

    A subtree that is in none of the trees remains a `NotInThisPartition`.

    Raises:
      SelectionError: two trees have different subtrees in the same place.

    Example:
      >>> from shardinit import deferred
      >>> ints, rest = deferred.select([1, 2.5]).at_instances_of(int).partition()
      >>> ints, rest
      ([1, NotInThisPartition()], [NotInThisPartition(), 2.5])
      >>> deferred.combine(ints, rest)
      [1, 2.5]
    """
    return _combine(trees, ())


def _are_one_node(treedefs: list[Any]) -> bool:
    return all(treedef == treedefs[0] for treedef in treedefs)


def _combine(trees: tuple[Any, ...], path: KeyPath) -> Any:
    there = [t for t in trees if not isinstance(t, NotInThisPartition)] or trees[:1]
    if len(there) == 1:
        return there[0]
    levels = [level for tree in there if (level := one_level(tree)) is not None]
    if len(levels) < len(there) or not _are_one_node([x for _, x in levels]):
        raise SelectionError(
            f"combine at {path_str(path)!r}",
            f"{len(there)} of the trees have something of their own there",
            "exactly one, or the same node in all that go deeper",
        )
    merged = []
    for column in zip(*[children for children, _ in levels], strict=True):
        keys, below = zip(*column, strict=True)
        merged.append(_combine(below, (*path, keys[0])))
    return levels[0][1].unflatten(merged)
