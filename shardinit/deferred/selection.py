"""Selections: change a part of a frozen tree by saying which part, then what.

A `Selection` is a tree cut along some of its nodes. It holds the nodes at the cut,
which of them are selected, and the structure above, so that putting the nodes back, or
others in their place, gives the tree again. Each step (``at``, ``where``, …) cuts the
selected nodes further; no selected node lies inside another.
"""

from __future__ import annotations

import dataclasses
import types
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Generic, TypeVar, overload

import jax

from shardinit.core.paths import path_str
from shardinit.deferred.cutting import (
    KeyPath,
    Mark,
    NotInThisPartition,
    is_mark,
    mark_picked,
    mark_where,
)
from shardinit.deferred.dataclass import pytree_dataclass
from shardinit.deferred.node import TreeNode
from shardinit.errors import SelectionError

S = TypeVar("S")
N = TypeVar("N")

_STATIC = {"pytree_node": False}


def _at_marks(marked: Any) -> Selection[Any]:
    """The selection of what is marked in a tree."""
    nodes, treedef = jax.tree.flatten(marked, is_leaf=is_mark)
    selected = tuple(map(is_mark, nodes))
    bare = [node.node if is_mark(node) else node for node in nodes]
    return Selection(bare, selected, treedef)


@pytree_dataclass
class Selection(TreeNode, Generic[S]):
    """Some nodes of a tree, to be looked at or replaced.

    Attributes:
      nodes: the nodes at the cut, selected or not.
      selected: for each whether it is selected.
      treedef: the structure above the cut.

    Example:
      >>> from shardinit import deferred
      >>> selection = deferred.select([1, {"a": 2.5}]).at_instances_of(float)
      >>> selection.count(), selection.get()
      (1, 2.5)
      >>> selection.set(0.0)
      [1, {'a': 0.0}]
    """

    nodes: list[Any]
    selected: tuple[bool, ...] = dataclasses.field(metadata=_STATIC)
    treedef: Any = dataclasses.field(metadata=_STATIC)

    # What is selected.

    def count(self) -> int:
        """How many nodes are selected."""
        return sum(self.selected)

    def __len__(self) -> int:
        return self.count()

    def is_empty(self) -> bool:
        """Whether none is."""
        return not any(self.selected)

    def get(self) -> S:
        """The one node that is selected.

        Raises:
          SelectionError: none or several are.
        """
        found = self.get_sequence()
        if len(found) != 1:
            raise SelectionError(
                "Selection.get",
                f"{len(found)} nodes are selected",
                "exactly one",
                "get_sequence() and get_by_path() give all of them",
            )
        return found[0]

    def get_sequence(self) -> tuple[S, ...]:
        """The selected nodes in the order of the tree."""
        pairs = zip(self.nodes, self.selected, strict=True)
        return tuple([node for node, taken in pairs if taken])

    def get_by_path(self) -> OrderedDict[KeyPath, S]:
        """The selected nodes by their key paths, in the order of the tree."""
        return OrderedDict(zip(self.get_keypaths(), self.get_sequence(), strict=True))

    def get_keypaths(self) -> tuple[KeyPath, ...]:
        """The key paths of the selected nodes."""
        numbered = self.treedef.unflatten(range(len(self.nodes)))
        pairs, _ = jax.tree_util.tree_flatten_with_path(numbered)
        return tuple([path for path, number in pairs if self.selected[number]])

    def assert_count_is(self, n: int) -> Selection[S]:
        """The selection itself.

        Raises:
          AssertionError: another number of nodes is selected.
        """
        if self.count() != n:
            raise AssertionError(f"{self.count()} nodes are selected, not {n}")
        return self

    # What takes their place.

    @overload
    def apply(self, fn: Callable[[S], Any], *, with_keypath: bool = False) -> Any: ...

    @overload
    def apply(self, fn: Callable[[KeyPath, S], Any], *, with_keypath: bool) -> Any: ...

    def apply(self, fn: Any, *, with_keypath: bool = False) -> Any:
        """The whole tree with ``fn(node)`` for each selected node.

        Args:
          fn: from a node, or its key path and it, to what takes its place.
          with_keypath: whether ``fn`` gets the key path first.
        """
        if with_keypath:
            found = self.get_by_path().items()
            return self.set_sequence([fn(path, node) for path, node in found])
        return self.set_sequence([fn(node) for node in self.get_sequence()])

    def set(self, replacement: Any) -> Any:
        """The whole tree with ``replacement`` for each selected node."""
        return self.apply(lambda _: replacement)

    def set_sequence(self, replacements: Iterable[Any]) -> Any:
        """The whole tree with the replacements, in order, for the selected nodes.

        Raises:
          SelectionError: there are more or fewer of them than selected nodes.
        """
        given = list(replacements)
        if len(given) != self.count():
            raise SelectionError(
                "Selection.set_sequence",
                f"{len(given)} replacements for {self.count()} selected nodes",
                "one for each",
            )
        rest = iter(given)
        pairs = zip(self.nodes, self.selected, strict=True)
        return self.treedef.unflatten(
            [next(rest) if taken else node for node, taken in pairs]
        )

    def set_by_path(
        self, replacer: Mapping[KeyPath, Any] | Callable[[KeyPath], Any]
    ) -> Any:
        """The whole tree with the selected nodes replaced by what their paths say.

        Args:
          replacer: from key path to replacement, a mapping or a function.

        Raises:
          SelectionError: the mapping lacks the path of a selected node.
        """
        paths = self.get_keypaths()
        if not isinstance(replacer, Mapping):
            return self.set_sequence([replacer(path) for path in paths])
        missing = [path_str(path) for path in paths if path not in replacer]
        if missing:
            raise SelectionError(
                "Selection.set_by_path",
                f"no replacement for {', '.join(map(repr, missing[:5]))}",
                "one for each selected node",
            )
        return self.set_sequence([replacer[path] for path in paths])

    def deselect(self) -> Any:
        """The whole tree."""
        return self.treedef.unflatten(self.nodes)

    # Other selections of the same tree.

    def at(self, accessor_fn: Callable[[S], Any], multiple: bool = False) -> Selection:
        """Selects the node that ``accessor_fn`` picks in each selected node.

        Args:
          accessor_fn: such as ``lambda model: model.layers[2].weight``; may look at
            structure, never at values: it gets a copy with stand-ins for leaves.
          multiple: whether it returns several nodes.

        Raises:
          SelectionError: what it returned is no node of the tree.
        """
        return _at_marks(self.apply(lambda x: mark_picked(x, accessor_fn, multiple)))

    def at_instances_of(
        self, cls: type[N] | tuple[type[N], ...] | types.UnionType
    ) -> Selection[N]:
        """Selects the outermost instances of a class, or of one of several."""
        return self.at_subtrees_where(lambda node: isinstance(node, cls))

    def at_subtrees_where(
        self, filter_fn: Callable[..., bool], *, with_keypath: bool = False
    ) -> Selection[Any]:
        """Selects the outermost nodes, inside the selected ones, that pass a test.

        Args:
          filter_fn: from a node, or its key path and it, to a bool. The key path
            begins at the selected node.
          with_keypath: whether ``filter_fn`` gets the key path first.
        """
        if with_keypath:
            return _at_marks(self.apply(lambda x: mark_where(x, (), filter_fn)))

        def mark(node: Any) -> Any:
            return Mark(node) if filter_fn(node) else node

        # JAX walks the tree, and asks the test at every node and leaf of it.
        return _at_marks(
            self.apply(lambda node: jax.tree.map(mark, node, is_leaf=filter_fn))
        )

    def at_pytree_leaves(self) -> Selection[Any]:
        """Selects all leaves of the selected nodes."""
        return _at_marks(self.apply(lambda node: jax.tree.map(Mark, node)))

    def at_children(self) -> Selection[Any]:
        """Selects the direct children of the selected nodes."""
        return self.at_subtrees_where(lambda path, _: len(path) == 1, with_keypath=True)

    def at_keypaths(self, keypaths: Iterable[KeyPath]) -> Selection[Any]:
        """Selects the nodes at key paths that begin at the selected nodes."""
        wanted = set(map(tuple, keypaths))
        return self.at_subtrees_where(lambda path, _: path in wanted, with_keypath=True)

    def at_equal_to(self, template: N) -> Selection[N]:
        """Selects the outermost nodes that equal ``template``; arrays never do.

        Raises:
          SelectionError: ``template`` is an array: its ``==`` gives an array.
        """
        if hasattr(template, "__array__"):
            raise SelectionError(
                "Selection.at_equal_to",
                "the template is an array",
                "something that == compares to a bool",
                "at_subtrees_where takes any test",
            )

        def equal(node: Any) -> bool:
            if hasattr(node, "__array__") or type(node) is not type(template):
                return False
            return bool(node == template)

        return self.at_subtrees_where(equal)

    def where(
        self, filter_fn: Callable[..., bool], *, with_keypath: bool = False
    ) -> Selection[S]:
        """Keeps those of the selected nodes that pass a test.

        Args:
          filter_fn: from a node, or its key path and it, to a bool.
          with_keypath: whether ``filter_fn`` gets the key path first.
        """
        nodes = self.get_sequence()
        if with_keypath:
            pairs = zip(self.get_keypaths(), nodes, strict=True)
            keep = [bool(filter_fn(path, node)) for path, node in pairs]
        else:
            keep = [bool(filter_fn(node)) for node in nodes]
        return self._keep(keep)

    def pick_nth_selected(self, n: int | Iterable[int]) -> Selection[S]:
        """Keeps the ``n``-th selected node alone, or those of several numbers.

        Raises:
          SelectionError: there is no such node.
        """
        count = self.count()
        wanted = [n] if isinstance(n, int) else list(n)
        for number in wanted:
            if not -count <= number < count:
                raise SelectionError(
                    "Selection.pick_nth_selected",
                    f"number {number} of {count} selected nodes",
                    f"a number from {-count} to {count - 1}",
                )
        places = {number % count for number in wanted}
        return self._keep([place in places for place in range(count)])

    def invert(self) -> Selection[Any]:
        """Selects the largest nodes that hold nothing of what is selected now."""
        now = set(self.get_keypaths())
        above = {path[:end] for path in now for end in range(len(path) + 1)}

        def test(path: KeyPath, _: Any) -> bool:
            return path in now or path not in above

        cut = select(self.deselect()).at_subtrees_where(test, with_keypath=True)
        return cut.where(lambda path, _: path not in now, with_keypath=True)

    def partition(self) -> tuple[Any, Any]:
        """Two trees, of what is selected and of the rest; `combine` is the inverse.

        In each a `NotInThisPartition`, which has no leaves, stands for what the other
        has.
        """
        hole = NotInThisPartition()
        return self.invert().set(hole), self.set(hole)

    def _keep(self, keep: list[bool]) -> Selection[S]:
        rest = iter(keep)
        kept = tuple(taken and next(rest) for taken in self.selected)
        return Selection(self.nodes, kept, self.treedef)


def select(tree: N) -> Selection[N]:
    """Selects the whole of any pytree, as the start of a change that copies.

    Example:
      >>> from shardinit import deferred
      >>> tree = {"a": 1, "b": [2, 3]}
      >>> deferred.select(tree).at(lambda t: t["b"][0]).apply(lambda x: 10 * x)
      {'a': 1, 'b': [20, 3]}
    """
    return _at_marks(Mark(tree))
