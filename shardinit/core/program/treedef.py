"""The tree of a result, written without its classes.

Dicts, lists, tuples and None are kept; any other node becomes a dict of its children's
names, which is what a reader without the model's classes gets.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import TypeVar

import jax

from shardinit.core.paths import entry_name
from shardinit.core.types import Tree, TreeDef
from shardinit.v1 import program_pb2 as pb

T = TypeVar("T")


_KINDS = {
    type(None): pb.Node.KIND_NONE,
    list: pb.Node.KIND_LIST,
    tuple: pb.Node.KIND_TUPLE,
}
# A node in the tree, the number of its first leaf, and how far below the root it is.
_Place = tuple[TreeDef, int, int]


def write_tree(tree: TreeDef) -> list[pb.Node]:
    """A pytree structure as nodes in preorder."""
    numbered = jax.tree.unflatten(tree, range(tree.num_leaves))
    paths = [p for p, _ in jax.tree_util.tree_leaves_with_path(numbered)]
    nodes: list[pb.Node] = []
    # An explicit stack: a tree may be deeper than Python recurses.
    stack: list[_Place] = [(tree, 0, 0)]
    while stack:
        place = stack.pop()
        node, children = _without_children(place[0]), _children(place)
        if node.kind == pb.Node.KIND_DICT:
            children, names = _named(place[0], children, paths)
            node.keys.extend(map(_key, names))
        node.children = len(children)
        nodes.append(node)
        stack.extend(reversed(children))
    return nodes


def _without_children(node: TreeDef) -> pb.Node:
    data = node.node_data()
    if data is not None:
        return pb.Node(kind=_KINDS.get(data[0], pb.Node.KIND_DICT))
    is_leaf = node.num_leaves == 1
    return pb.Node(kind=pb.Node.KIND_LEAF if is_leaf else pb.Node.KIND_NONE)


def _children(place: _Place) -> list[_Place]:
    node, first, depth = place
    children = []
    for child in node.children():
        children.append((child, first, depth + 1))
        first += child.num_leaves
    return children


def _named(
    node: TreeDef, children: list[_Place], paths: Sequence[jax.tree_util.KeyPath]
) -> tuple[list[_Place], list[Hashable]]:
    """The children that have names, and those, by a dict's keys or by leaves' paths."""
    kind, held = node.node_data()
    if kind is dict:
        return children, list(held)
    # With nothing inside there is no leaf to learn a child's name from.
    kept = [child for child in children if child[0].num_leaves]
    return kept, [entry_name(paths[first][depth - 1]) for _, first, depth in kept]


def _key(name: Hashable) -> pb.NodeKey:
    if isinstance(name, int) and not isinstance(name, bool):
        return pb.NodeKey(number=name)
    return pb.NodeKey(text=str(name))


def read_tree(nodes: Sequence[pb.Node], leaves: int) -> tuple[TreeDef, list[int]]:
    """Nodes in preorder as a pytree structure.

    Returns:
      the structure, and for each of its leaves the number it was written under (a
      dict sorts its keys, the node that it stands for may not have).

    Raises:
      ValueError: the nodes are no tree, or have another number of leaves.
    """
    tokens = iter(nodes)
    numbers = iter(range(leaves))
    # Each open node: its message, the children so far.
    stack: list[tuple[pb.Node, list[Tree]]] = []
    value: Tree = None
    while True:
        node = _next(tokens, "it ends inside a node")
        if node.kind in (pb.Node.KIND_LEAF, pb.Node.KIND_NONE):
            if node.kind == pb.Node.KIND_LEAF:
                value = _next(numbers, f"it has more than {leaves} leaves")
            else:
                value = None
        else:
            stack.append((node, []))
            value = stack
        while stack:
            opened, children = stack[-1]
            if value is not stack:
                children.append(value)
            if len(children) < opened.children:
                break
            stack.pop()
            value = _build(opened, children)
        if not stack:
            break
    if any(True for _ in tokens) or any(True for _ in numbers):
        raise ValueError("the tree and its leaves do not match")
    try:
        flat, structure = jax.tree.flatten(value)
    except (RecursionError, SystemError) as error:
        # JAX recurses here: a thousand levels on Python 3.11, some thousands on 3.13.
        # Beyond them 0.10.2 and 0.12.0.1 raise a SystemError that hides the other one.
        raise ValueError("the tree: it is deeper than JAX flattens here") from error
    return structure, flat


def _next(items: Iterator[T], problem: str) -> T:
    for item in items:
        return item
    raise ValueError(f"the tree: {problem}")


def _build(node: pb.Node, children: list[Tree]) -> Tree:
    if node.kind == pb.Node.KIND_LIST:
        return children
    if node.kind == pb.Node.KIND_TUPLE:
        return tuple(children)
    if node.kind != pb.Node.KIND_DICT or len(node.keys) != len(children):
        raise ValueError(f"the tree: a node of kind {node.kind}")
    names = [k.number if k.WhichOneof("key") == "number" else k.text for k in node.keys]
    if len(set(names)) != len(names) or len({type(n) for n in names}) > 1:
        raise ValueError("the tree: keys that cannot be sorted or are repeated")
    return dict(zip(names, children, strict=True))
