"""Selections: changing a part of a frozen tree by selecting it and replacing it.

A `Selection` is a tree that is cut at some of its nodes. It holds the nodes at the cut,
a flag for each whether it is selected, and the structure above the cut. Putting the
nodes back, or others in their place, makes the tree again. Each step (``at``,
``where``, …) selects nodes inside the selected ones, or fewer of them. No selected node
is inside another.
"""

from __future__ import annotations

import dataclasses
import types
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Generic, TypeVar

import jax

from shardinit.core.paths import path_str
from shardinit.deferred.cutting import (
    KeyPath,
    Mark,
    NotInThisPartition,
    inlined,
    is_childless,
    is_mark,
    mark_innermost,
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
    """Makes the selection of the marked nodes of a tree."""
    nodes, treedef = jax.tree.flatten(marked, is_leaf=is_mark)
    selected = tuple(map(is_mark, nodes))
    bare = [node.node if is_mark(node) else node for node in nodes]
    return Selection(bare, selected, treedef)


@pytree_dataclass
class Selection(TreeNode, Generic[S]):
    """Some nodes of a tree, to read or replace them.

    In the examples of the methods ``select`` is ``shardinit.deferred.select``.

    Attributes:
      nodes: the nodes at the cut, selected or not.
      selected: whether each node is selected.
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

    # Reading.

    def count(self) -> int:
        """Returns the number of selected nodes."""
        return sum(self.selected)

    def __len__(self) -> int:
        return self.count()

    def is_empty(self) -> bool:
        """Whether no node is selected.

        Example:
          >>> select([1, 2.5]).at_instances_of(str).is_empty()
          True
        """
        return not any(self.selected)

    def get(self) -> S:
        """Returns the selected node, if there is exactly one.

        Raises:
          SelectionError: no node, or several nodes, are selected.

        Example:
          >>> select([1, 2.5]).at_instances_of(float).get()
          2.5
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
        """Returns the selected nodes in the order of the tree.

        Example:
          >>> select([1, 2.5, 3]).at_instances_of(int).get_sequence()
          (1, 3)
        """
        pairs = zip(self.nodes, self.selected, strict=True)
        return tuple([node for node, taken in pairs if taken])

    def get_by_path(self) -> OrderedDict[KeyPath, S]:
        """Returns the selected nodes by key path, in the order of the tree.

        Example:
          >>> found = select({"a": 1, "b": 2.5}).at_instances_of(int).get_by_path()
          >>> {path_str(path): node for path, node in found.items()}
          {'a': 1}
        """
        return OrderedDict(zip(self.get_keypaths(), self.get_sequence(), strict=True))

    def get_keypaths(self) -> tuple[KeyPath, ...]:
        """Returns the key paths of the selected nodes.

        Example:
          >>> paths = select({"a": 1, "b": [2]}).at_instances_of(int).get_keypaths()
          >>> [path_str(path) for path in paths]
          ['a', 'b/0']
        """
        numbered = self.treedef.unflatten(range(len(self.nodes)))
        pairs, _ = jax.tree_util.tree_flatten_with_path(numbered)
        return tuple([path for path, number in pairs if self.selected[number]])

    def assert_count_is(self, n: int) -> Selection[S]:
        """Returns the selection itself if ``n`` nodes are selected.

        Raises:
          AssertionError: another number of nodes is selected.

        Example:
          >>> select([1, 2.5]).at_instances_of(int).assert_count_is(1).set(0)
          [0, 2.5]
        """
        if self.count() != n:
            raise AssertionError(f"{self.count()} nodes are selected, not {n}")
        return self

    # Replacing.

    def apply(
        self,
        fn: Callable[..., Any],
        *,
        with_keypath: bool = False,
        keep_selected: bool = False,
    ) -> Any:
        """Returns the whole tree with ``fn(node)`` in place of each selected node.

        Args:
          fn: maps a node, or its key path and the node, to the replacement.
          with_keypath: whether the key path is passed as the first argument.
          keep_selected: whether a selection of the replacements is returned in place
            of the tree.

        Example:
          >>> select([1, 2.5, 3]).at_instances_of(int).apply(lambda number: -number)
          [-1, 2.5, -3]
        """
        changed = self._with(self._called(fn, with_keypath))
        return changed if keep_selected else changed.deselect()

    def set(self, replacement: Any) -> Any:
        """Returns the whole tree with ``replacement`` for each selected node."""
        return self.apply(lambda _: replacement)

    def set_sequence(self, replacements: Iterable[Any]) -> Any:
        """Returns the whole tree with one replacement for each selected node, in order.

        Raises:
          SelectionError: there are more or fewer replacements than selected nodes.

        Example:
          >>> select([1, 2.5, 3]).at_instances_of(int).set_sequence(["a", "b"])
          ['a', 2.5, 'b']
        """
        given = list(replacements)
        if len(given) != self.count():
            raise SelectionError(
                "Selection.set_sequence",
                f"{len(given)} replacements for {self.count()} selected nodes",
                "one for each",
            )
        return self._with(given).deselect()

    def set_by_path(
        self, replacer: Mapping[KeyPath, Any] | Callable[[KeyPath], Any]
    ) -> Any:
        """Returns the whole tree with the selected nodes replaced by key path.

        Args:
          replacer: a mapping or a function from key paths to replacements.

        Raises:
          SelectionError: the mapping lacks the path of a selected node.

        Example:
          >>> numbers = select({"a": 1, "b": [2]}).at_instances_of(int)
          >>> numbers.set_by_path(path_str)
          {'a': 'a', 'b': ['b/0']}
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

    def select_and_set_by_path(
        self, replacements_by_path: Mapping[KeyPath, Any]
    ) -> Any:
        """Returns the whole tree with nodes replaced by key path.

        Args:
          replacements_by_path: replacements by key paths that start at the selected
            nodes. A path without a node is ignored.

        Example:
          >>> (path,) = select({"a": 1}).at_instances_of(int).get_keypaths()
          >>> select({"a": 1, "b": 2}).select_and_set_by_path({path: 0})
          {'a': 0, 'b': 2}
        """

        def replace(node: Any) -> Any:
            at = select(node).at_keypaths(replacements_by_path)
            return at.set_by_path(replacements_by_path)

        return self.apply(replace)

    def apply_and_inline(
        self, fn: Callable[..., Iterable[Any]], *, with_keypath: bool = False
    ) -> Any:
        """Returns the whole tree with several items in place of each selected item.

        Args:
          fn: maps a node, or its key path and the node, to the items that replace it.
          with_keypath: whether the key path is passed as the first argument.

        Raises:
          SelectionError: a selected node is no item of a list or tuple.

        Example:
          >>> select([1, 2.5]).at_instances_of(int).apply_and_inline(lambda x: (x, x))
          [1, 1, 2.5]
        """
        marked = self.apply(Mark)
        return inlined(marked, (), fn if with_keypath else lambda _, node: fn(node))

    def remove_from_parent(self) -> Any:
        """Returns the whole tree without the selected items of lists and tuples.

        Raises:
          SelectionError: a selected node is no item of a list or tuple.

        Example:
          >>> select([1, 2.5, 3]).at_instances_of(float).remove_from_parent()
          [1, 3]
        """
        return self.apply_and_inline(lambda _: ())

    def insert_before(self, value: Any, and_select: bool = False) -> Any:
        """Returns the whole tree with ``value`` before each selected item.

        Args:
          value: the new item of each list or tuple.
          and_select: whether a selection of the new items is returned in place of the
            tree.

        Raises:
          SelectionError: a selected node is no item of a list or tuple.

        Example:
          >>> select([1, 2.5]).at_instances_of(float).insert_before("new")
          [1, 'new', 2.5]
        """
        if and_select:
            return _at_marks(self.insert_before(Mark(value)))
        return self.apply_and_inline(lambda node: (value, node))

    def insert_after(self, value: Any, and_select: bool = False) -> Any:
        """As `insert_before`, with ``value`` after each selected item.

        Example:
          >>> select([1, 2.5]).at_instances_of(int).insert_after("new")
          [1, 'new', 2.5]
        """
        if and_select:
            return _at_marks(self.insert_after(Mark(value)))
        return self.apply_and_inline(lambda node: (node, value))

    def deselect(self) -> Any:
        """Returns the whole tree.

        Example:
          >>> select([1, 2.5]).at_instances_of(int).deselect()
          [1, 2.5]
        """
        return self.treedef.unflatten(self.nodes)

    # Selecting other nodes of the same tree.

    def at(self, accessor_fn: Callable[[S], Any], multiple: bool = False) -> Selection:
        """Selects the node that ``accessor_fn`` returns for each selected node.

        Args:
          accessor_fn: such as ``lambda model: model.layers[2].weight``. It may depend
            on the structure and not on values: it is called with a copy in which
            placeholders replace the leaves.
          multiple: whether ``accessor_fn`` returns several nodes.

        Raises:
          SelectionError: ``accessor_fn`` returned something that is not a node of the
            tree.

        Example:
          >>> select({"a": 1, "b": 2}).at(lambda tree: tree["a"]).set(0)
          {'a': 0, 'b': 2}
        """
        return _at_marks(self.apply(lambda x: mark_picked(x, accessor_fn, multiple)))

    def refine(self, selector_fn: Callable[[S], Selection[N]]) -> Selection[N]:
        """Selects in each selected node what a function of that node selects.

        Args:
          selector_fn: maps a node to a selection, usually in that node. The tree of
            that selection takes the place of the node.

        Example:
          >>> pair = {"in": [1, 2], "out": [3]}
          >>> lists = select(pair).at_instances_of(list)
          >>> lists.refine(lambda node: select(node).at(lambda x: x[0])).set(0)
          {'in': [0, 2], 'out': [0]}
        """
        return self.apply(selector_fn, keep_selected=True).flatten_selected_selections()

    def flatten_selected_selections(self) -> Selection[Any]:
        """Selects what selections select that are themselves the selected nodes.

        Raises:
          SelectionError: a selected node is no selection.

        Example:
          >>> numbers = lambda node: select(node).at_instances_of(int)
          >>> lists = select({"in": [1, 2.5]}).at_instances_of(list)
          >>> nested = lists.apply(numbers, keep_selected=True)
          >>> nested.flatten_selected_selections().set(0)
          {'in': [0, 2.5]}
        """

        def marked(inner: Any) -> Any:
            if isinstance(inner, Selection):
                return inner.apply(Mark)
            raise SelectionError(
                "Selection.refine",
                f"a {type(inner).__name__}",
                "a selection",
                "Return select(node) and what follows, not a node of the tree",
            )

        return _at_marks(self.apply(marked))

    def at_instances_of(
        self,
        cls: type[N] | tuple[type[N], ...] | types.UnionType,
        innermost: bool = False,
    ) -> Selection[N]:
        """Selects the outermost instances of a class, or of any of several.

        Args:
          cls: the class, a tuple of classes, or a union.
          innermost: whether the innermost instances are selected instead.
        """
        return self.at_subtrees_where(
            lambda node: isinstance(node, cls), innermost=innermost
        )

    def at_subtrees_where(
        self,
        filter_fn: Callable[..., bool],
        *,
        with_keypath: bool = False,
        absolute_keypath: bool = False,
        innermost: bool = False,
    ) -> Selection[Any]:
        """Selects the outermost nodes, inside the selected ones, that pass a test.

        Args:
          filter_fn: maps a node, or its key path and the node, to a bool.
          with_keypath: whether the key path is passed as the first argument.
          absolute_keypath: whether key paths start at the root of the tree; by default
            they start at the selected node.
          innermost: whether the innermost nodes that pass are selected instead.

        Example:
          >>> select([1, 5, 9]).at_subtrees_where(lambda x: x in (1, 9)).set(0)
          [0, 5, 0]
        """
        if not (with_keypath or innermost):
            # JAX walks the tree, and asks the test at every node and leaf of it.
            def mark(node: Any) -> Any:
                return Mark(node) if filter_fn(node) else node

            return _at_marks(
                self.apply(lambda node: jax.tree.map(mark, node, is_leaf=filter_fn))
            )
        test = filter_fn if with_keypath else lambda _, node: filter_fn(node)
        walk = mark_innermost if innermost else mark_where

        def marked(path: KeyPath, node: Any) -> Any:
            return walk(node, path if absolute_keypath else (), test)

        return _at_marks(self.apply(marked, with_keypath=True))

    def at_pytree_leaves(self) -> Selection[Any]:
        """Selects all leaves of the selected nodes.

        Example:
          >>> select([1, {"a": 2}]).at_pytree_leaves().get_sequence()
          (1, 2)
        """
        return _at_marks(self.apply(lambda node: jax.tree.map(Mark, node)))

    def at_childless(self) -> Selection[Any]:
        """Selects all leaves, and the nodes without children, such as empty lists.

        Example:
          >>> select([1, {"a": []}]).at_childless().get_sequence()
          (1, [])
        """
        return self.at_subtrees_where(is_childless)

    def at_children(self) -> Selection[Any]:
        """Selects the direct children of the selected nodes.

        Example:
          >>> select([1, {"a": 2}]).at_children().get_sequence()
          (1, {'a': 2})
        """
        return self.at_subtrees_where(lambda path, _: len(path) == 1, with_keypath=True)

    def at_keypaths(self, keypaths: Iterable[KeyPath]) -> Selection[Any]:
        """Selects the nodes at key paths that start at the selected nodes.

        Example:
          >>> (path,) = select({"a": 1}).at_instances_of(int).get_keypaths()
          >>> select({"a": 3, "b": 4}).at_keypaths([path]).get()
          3
        """
        wanted = set(map(tuple, keypaths))
        return self.at_subtrees_where(lambda path, _: path in wanted, with_keypath=True)

    def at_equal_to(self, template: N) -> Selection[N]:
        """Selects the outermost nodes that equal ``template``, which is not an array.

        Raises:
          SelectionError: ``template`` is an array, whose ``==`` returns an array.

        Example:
          >>> select(["x", "y", "x"]).at_equal_to("x").count()
          2
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
        """Keeps the selected nodes that pass a test.

        Args:
          filter_fn: maps a node, or its key path and the node, to a bool.
          with_keypath: whether the key path is passed as the first argument.

        Example:
          >>> select([1, 5, 9]).at_pytree_leaves().where(lambda x: x > 4).set(0)
          [1, 0, 0]
        """
        return self._keep(map(bool, self._called(filter_fn, with_keypath)))

    def pick_nth_selected(self, n: int | Iterable[int]) -> Selection[S]:
        """Keeps only the ``n``-th selected node, or several by their numbers.

        Raises:
          SelectionError: a number is out of range.

        Example:
          >>> select([1, 5, 9]).at_pytree_leaves().pick_nth_selected(-1).set(0)
          [1, 5, 0]
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
        return self._keep(place in places for place in range(count))

    def invert(self) -> Selection[Any]:
        """Selects the largest nodes that contain none of the selected nodes.

        Example:
          >>> select([1, 2.5, 3]).at_instances_of(float).invert().get_sequence()
          (1, 3)
        """
        now = set(self.get_keypaths())
        above = {path[:end] for path in now for end in range(len(path) + 1)}

        def test(path: KeyPath, _: Any) -> bool:
            return path in now or path not in above

        cut = select(self.deselect()).at_subtrees_where(test, with_keypath=True)
        return cut.where(lambda path, _: path not in now, with_keypath=True)

    def partition(self, at_leaves: bool = False) -> tuple[Any, Any]:
        """Returns a tree of the selected nodes and one of the rest; see `combine`.

        In each, a `NotInThisPartition`, which has no leaves, replaces the nodes that
        are in the other.

        Args:
          at_leaves: whether each leaf is replaced on its own, so that both trees have
            the structure of the whole tree.

        Example:
          >>> chosen, rest = select([1, 2.5]).at_instances_of(int).partition()
          >>> chosen
          [1, NotInThisPartition()]
        """
        mine, rest = self, self.invert()
        if at_leaves:
            mine, rest = self.at_pytree_leaves(), rest.at_pytree_leaves()
        hole = NotInThisPartition()
        return rest.set(hole), mine.set(hole)

    def _called(self, fn: Callable[..., N], with_keypath: bool) -> list[N]:
        """What a function of the node, or of path and node, returns for each."""
        if with_keypath:
            return [fn(path, node) for path, node in self.get_by_path().items()]
        return [fn(node) for node in self.get_sequence()]

    def _with(self, replacements: Iterable[Any]) -> Selection[Any]:
        rest = iter(replacements)
        pairs = zip(self.nodes, self.selected, strict=True)
        nodes = [next(rest) if taken else node for node, taken in pairs]
        return Selection(nodes, self.selected, self.treedef)

    def _keep(self, keep: Iterable[bool]) -> Selection[S]:
        rest = iter(keep)
        kept = tuple(taken and next(rest) for taken in self.selected)
        return Selection(self.nodes, kept, self.treedef)


def select(tree: N) -> Selection[N]:
    """Selects a whole pytree, to select and change parts of a copy.

    Example:
      >>> from shardinit import deferred
      >>> tree = {"a": 1, "b": [2, 3]}
      >>> deferred.select(tree).at(lambda t: t["b"][0]).apply(lambda x: 10 * x)
      {'a': 1, 'b': [20, 3]}
    """
    return _at_marks(Mark(tree))
