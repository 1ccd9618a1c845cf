"""The tree of a result, written without its classes.

Dicts, lists, tuples and None are kept; any other node becomes a dict of its children's
names, which is what a reader without the model's classes gets.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import jax

from shardinit.core.paths import entry_name
from shardinit.core.types import Tree, TreeDef
from shardinit.v1 import program_pb2 as pb

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
    number = leaves
    # From the last node to the first: what is behind a node begins with its children.
    behind: list[Tree] = []
    for node in reversed(nodes):
        if node.kind == pb.Node.KIND_LEAF:
            number -= 1
            behind.append(number)
        elif node.kind == pb.Node.KIND_NONE:
            behind.append(None)
        elif node.children > len(behind):
            raise ValueError("the tree: it ends inside a node")
        else:
            children = [behind.pop() for _ in range(node.children)]
            behind.append(_build(node, children))
    if len(behind) != 1 or number:
        raise ValueError("the tree and its leaves do not match")
    try:
        flat, structure = jax.tree.flatten(behind[0])
    except (RecursionError, SystemError) as error:
        # JAX recurses here: a thousand levels on Python 3.11, some thousands on 3.13
        # (https://github.com/openxla/xla/pull/3980). Beyond them 0.10.2 and 0.12.0.1
        # raise a SystemError, of which the RecursionError is the cause.
        raise ValueError("the tree: it is deeper than JAX flattens here") from error
    return structure, flat


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
