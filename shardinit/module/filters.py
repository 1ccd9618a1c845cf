"""Filtering the leaves of a module by kind, and merging modules.

``m.filter(Parameter)`` is a module of the same structure in which every leaf of another
kind is `Nothing`, a pytree node without leaves. Gradients and optimizers therefore see
only the parameters. ``m.merge(part)`` puts the part back.

An empty field (`Nothing`, None or an `Initializer`) replaces no value in a merge. An
initialised module that is merged with an uninitialised one, in either order, keeps its
values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax.tree_util import DictKey, GetAttrKey, SequenceKey

from shardinit.core.paths import path_str
from shardinit.errors import ModuleFieldError
from shardinit.module import walk
from shardinit.module.fields import NOTHING, FieldInfo, Nothing, is_empty
from shardinit.module.walk import ModuleNode, Path

T = TypeVar("T")
Filter = type | Callable[[FieldInfo], bool]


def filter(tree: T, *filters: Filter) -> T:
    """Returns a copy of any pytree with `Nothing` for leaves that fail a filter.

    Args:
      tree: a module, or a pytree of modules and other leaves. A leaf outside of all
        modules has no kind; its field has no name and no module.
      *filters: kinds (a leaf passes when its field's kind is one or a subclass), or
        predicates on `FieldInfo`.

    Example:
      >>> import jax
      >>> from shardinit.module import Linear, Module, Parameter, filter
      >>> class Scale(Module):
      ...     factor: float = Parameter.node(2.0)
      >>> filter({"model": Scale(), "step": 3}, Parameter)
      {'model': Scale(factor=2.0), 'step': Nothing}
    """

    def part(path: Path, node: Any) -> Any:
        if isinstance(node, ModuleNode):
            return filtered(node, filters, path)
        info = FieldInfo("", None, node, None, path_str(path))
        return _kept(info, filters)

    return jax.tree_util.tree_map_with_path(part, tree, is_leaf=walk.stops)


def filtered(root: Any, filters: tuple[Filter, ...], prefix: Path = ()) -> Any:
    """Returns a copy of a module with `Nothing` for leaves that fail a filter.

    Args:
      root: the module.
      filters: as for `filter`.
      prefix: the path of the module.
    """

    def keep(path: Path, owner: ModuleNode, name: str, leaf: Any) -> Any:
        kind, where = walk.kind_of(owner, name), path_str((*prefix, *path))
        return _kept(FieldInfo(name, kind, leaf, owner, where), filters)

    taken, _ = walk.copy(root)
    walk.map_leaves(taken, keep)
    return taken


def _kept(info: FieldInfo, filters: tuple[Filter, ...]) -> Any:
    def passes(test: Filter) -> bool:
        if isinstance(test, type):
            return info.kind is not None and issubclass(info.kind, test)
        return bool(test(info))

    return info.value if all(map(passes, filters)) else NOTHING


def merged(root: Any, others: tuple[Any, ...], *, inplace: bool) -> Any:
    """Returns ``root`` updated with the values of ``others``, in order.

    Settings (static fields, training, frozen) are those of ``root``. The result is
    marked initialised if one of the modules is and the result lacks no values.

    Raises:
      ModuleFieldError: the modules have different structures; it names the path.
    """
    result = root if inplace else walk.copy(root)[0]
    for other in others:
        if type(other) is not type(result):
            raise _mismatch((), result, other)
        _merge_module((), result, walk.copy(other)[0], set())
    return result


def _merge_module(path: Path, left: Any, right: Any, seen: set[int]) -> None:
    if id(left) in seen:
        return
    seen.add(id(left))
    names = walk.node_names(right)
    complete = left._initialized or right._initialized
    for name in sorted({*walk.node_names(left), *names}):
        here = (*path, GetAttrKey(name))
        mine = vars(left).get(name, NOTHING)
        theirs = vars(right).get(name, NOTHING) if name in names else NOTHING
        value = _merge(here, mine, theirs, seen)
        setattr(left, name, value)
        given = mine if left._initialized else theirs
        if walk.lacks(value) and not (given is None and value is None):
            complete = False
    _join_private(left, right, complete)


def _join_private(left: Any, right: Any, complete: bool) -> None:
    """Joins what two modules note of themselves beside their fields."""
    own = left.__dict__
    own["_initialized"] = complete
    own["_nodes"] = left._nodes | right._nodes
    own["_subtrees"] = {**(right._subtrees or {}), **(left._subtrees or {})} or None
    own["_rng_ran"] = left._rng_ran or right._rng_ran


def _merge(path: Path, left: Any, right: Any, seen: set[int]) -> Any:
    if is_empty(right):
        return right if isinstance(left, Nothing) else left
    if is_empty(left):
        return right
    if isinstance(left, ModuleNode) or isinstance(right, ModuleNode):
        if type(left) is not type(right):
            raise _mismatch(path, left, right)
        _merge_module(path, left, right, seen)
        return left
    if isinstance(left, dict) and isinstance(right, dict):
        return _merge_dicts(path, left, right, seen)
    if type(left) in (list, tuple) and type(left) is type(right):
        return _merge_items(path, left, right, seen)
    return _merge_nodes(path, left, right, seen)


def _merge_dicts(path: Path, left: dict, right: dict, seen: set[int]) -> dict:
    if left.keys() != right.keys():
        raise _mismatch(path, sorted(left), sorted(right))
    return type(left)(
        (k, _merge((*path, DictKey(k)), left[k], right[k], seen)) for k in left
    )


def _merge_items(path: Path, left: Any, right: Any, seen: set[int]) -> Any:
    if len(left) != len(right):
        raise _mismatch(path, f"{len(left)} items", f"{len(right)} items")
    return type(left)(
        _merge((*path, SequenceKey(i)), a, b, seen)
        for i, (a, b) in enumerate(zip(left, right, strict=True))
    )


def _merge_nodes(path: Path, left: Any, right: Any, seen: set[int]) -> Any:
    """Merges leaves, or nodes of other classes, whose children have no names here."""
    flat_left, tree_left = jax.tree.flatten(left, is_leaf=walk.stops)
    flat_right, tree_right = jax.tree.flatten(right, is_leaf=walk.stops)
    if tree_left != tree_right:
        raise _mismatch(path, tree_left, tree_right)
    if tree_left == jax.tree.structure(0):
        return right
    both = zip(flat_left, flat_right, strict=True)
    return jax.tree.unflatten(tree_left, [_merge(path, a, b, seen) for a, b in both])


def _mismatch(path: Path, left: Any, right: Any) -> ModuleFieldError:
    def name(value: Any) -> str:
        return type(value).__name__ if isinstance(value, ModuleNode) else str(value)

    return ModuleFieldError(
        f"merge at {path_str(path)!r}" if path else "merge",
        f"{name(right)[:200]} does not fit",
        name(left)[:200],
        "Merge modules of one structure, such as what filter() made of this one",
    )
