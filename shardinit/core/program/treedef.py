"""The tree of a result, written without its classes.

Dicts, lists, tuples and None are kept; any other node becomes a dict of its children's
names, which is what a reader without the model's classes gets.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax

from shardinit.core.types import TreeDef
from shardinit.v1 import program_pb2 as pb


def write_tree(tree: TreeDef) -> list[pb.Node]:
    """A pytree structure as nodes in preorder."""
    numbered = jax.tree.unflatten(tree, range(tree.num_leaves))
    paths = [p for p, _ in jax.tree_util.tree_leaves_with_path(numbered)]
    nodes: list[pb.Node] = []
    # An explicit stack: a tree may be deeper than Python recurses.
    stack = [(tree, 0, 0)]
    while stack:
        node, first, depth = stack.pop()
        data = node.node_data()
        children = node.children()
        if data is None:
            is_leaf = node.num_leaves == 1
            kind = pb.Node.KIND_LEAF if is_leaf else pb.Node.KIND_NONE
            nodes.append(pb.Node(kind=kind))
            continue
        kind_of, aux = data
        starts, start = [], first
        for child in children:
            starts.append(start)
            start += child.num_leaves
        if kind_of is type(None):
            nodes.append(pb.Node(kind=pb.Node.KIND_NONE))
            continue
        if kind_of is list or kind_of is tuple:
            is_list = kind_of is list
            kind = pb.Node.KIND_LIST if is_list else pb.Node.KIND_TUPLE
            nodes.append(pb.Node(kind=kind, children=len(children)))
            kept = list(zip(children, starts, strict=True))
        else:
            kept, names = [], []
            for number, (child, start) in enumerate(zip(children, starts, strict=True)):
                if kind_of is dict:
                    names.append(aux[number])
                elif child.num_leaves:
                    names.append(_name(paths[start][depth]))
                else:
                    continue  # nothing inside, and no leaf to learn its name from
                kept.append((child, start))
            node_keys = [_key(name) for name in names]
            nodes.append(
                pb.Node(kind=pb.Node.KIND_DICT, keys=node_keys, children=len(kept))
            )
        stack.extend((child, start, depth + 1) for child, start in reversed(kept))
    return nodes


def _name(entry: Any) -> Any:
    for attribute in ("key", "name", "idx"):
        if hasattr(entry, attribute):
            return getattr(entry, attribute)
    return str(entry)


def _key(name: Any) -> pb.NodeKey:
    if isinstance(name, int) and not isinstance(name, bool):
        return pb.NodeKey(number=name)
    return pb.NodeKey(text=str(name))


def read_tree(nodes: Sequence[pb.Node], leaves: int) -> tuple[Any, list[int]]:
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
    stack: list[tuple[pb.Node, list[Any]]] = []
    value: Any = None
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
    flat, structure = jax.tree.flatten(value)
    return structure, flat


def _next(items: Iterator[Any], problem: str) -> Any:
    for item in items:
        return item
    raise ValueError(f"the tree: {problem}")


def _build(node: pb.Node, children: list[Any]) -> Any:
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
