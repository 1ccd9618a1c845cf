"""Traversal of trees of modules: their fields, leaves and copies.

A field is a node of the pytree if it is declared as one or, without a declaration, if
it holds modules, lists or dicts of modules, or initialisers. An undeclared field that
was a node once remains one, whatever is assigned to it, so that the structure of the
tree stays the same while its values change.

A pytree does not record that one module occurs in two places. The functions here visit
each module once, by identity, with fields in alphabetical order. So copies share the
modules that their originals share, and a shared module is initialised once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import jax
import numpy as np
from jax.tree_util import GetAttrKey

from shardinit.core.paths import path_str
from shardinit.errors import ModuleFieldError
from shardinit.module.fields import Initializer, Nothing, is_array

T = TypeVar("T")
Path = tuple[Any, ...]


class ModuleNode:
    """The attributes of a module that traversal needs; the base of `Module`."""

    _fields: ClassVar[dict[str, dataclasses.Field[Any]]] = {}
    _nodes: frozenset[str] = frozenset()  # undeclared fields that are nodes
    _initialized: bool = False
    _rng_ran: bool = False
    _subtrees: dict[str, tuple[str, ...]] | None = None
    _training: bool = True
    _frozen: bool = False


# Attributes of a module that are not fields.
PRIVATE = frozenset(ModuleNode.__annotations__) - {"_fields"}


@dataclasses.dataclass(frozen=True)
class Hole:
    """Placeholder of a leaf, with its number among the holes of the tree."""

    number: int


def stops(value: Any) -> bool:
    """Whether traversal treats a value as a leaf although JAX would flatten it."""
    # To JAX None is a node without children: a field that still waits for its value
    # would have no place among the leaves.
    return value is None or isinstance(value, (ModuleNode, Initializer, Nothing))


def _holds_module(value: Any) -> bool:
    if isinstance(value, (ModuleNode, Initializer)):
        return True
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return False
    return any(map(_holds_module, value))


def node_names(module: ModuleNode) -> list[str]:
    """Names of the fields that are nodes of the pytree, in alphabetical order."""
    names, found = [], []
    for name, value in vars(module).items():
        if name in PRIVATE:
            continue
        field = module._fields.get(name)
        declared = field.metadata.get("node") if field is not None else None
        if declared is None and name not in module._nodes:
            declared = _holds_module(value)
            if declared:
                found.append(name)
        if declared or declared is None:
            names.append(name)
    if found:
        # Past ``__setattr__``, which refuses the names of a module's own state.
        module.__dict__["_nodes"] = module._nodes.union(found)
    return sorted(names)


def lacks(value: Any) -> bool:
    """Whether a field is None or holds an `Initializer`."""
    items = jax.tree.leaves(value, is_leaf=stops)
    return value is None or any(isinstance(x, Initializer) for x in items)


def static_fields(module: ModuleNode) -> dict[str, Any]:
    """Returns the fields outside the pytree, by name."""
    nodes = {*node_names(module), *PRIVATE}
    return {name: v for name, v in vars(module).items() if name not in nodes}


def kind_of(module: ModuleNode, name: str) -> type | None:
    """Returns the kind that field ``name`` is declared with, or None."""
    field = module._fields.get(name)
    return field.metadata.get("kind") if field is not None else None


def modules(root: ModuleNode) -> list[tuple[Path, ModuleNode]]:
    """Lists each module of a tree once, with its path, children before parents.

    Raises:
      ModuleFieldError: a module contains itself.
    """
    found: list[tuple[Path, ModuleNode]] = []
    done: dict[int, bool] = {}

    def visit(path: Path, module: ModuleNode) -> None:
        if id(module) in done:
            if not done[id(module)]:
                raise ModuleFieldError(
                    f"module {path_str(path)!r} ({type(module).__name__})",
                    "it contains itself",
                    "a tree",
                    "Declare the field that points back as static()",
                )
            return
        done[id(module)] = False
        for name in node_names(module):
            value = getattr(module, name)
            if isinstance(value, ModuleNode):
                visit((*path, GetAttrKey(name)), value)
            elif _holds_module(value) or not is_array(value):
                flat, _ = jax.tree_util.tree_flatten_with_path(value, is_leaf=stops)
                for below, item in flat:
                    if isinstance(item, ModuleNode):
                        visit((*path, GetAttrKey(name), *below), item)
        done[id(module)] = True
        found.append((path, module))

    visit((), root)
    return found


def map_leaves(root: ModuleNode, fn: Callable[[Path, Any, str, Any], Any]) -> None:
    """Replaces every leaf of a tree, in place, in the order of the pytree.

    Leaves of a module that occurs in two places are replaced once.

    Args:
      root: the outermost module.
      fn: maps path, module, field name and leaf to the new leaf. None, initialisers and
        `Nothing` count as leaves.
    """
    seen: set[int] = set()

    def visit(path: Path, module: ModuleNode) -> None:
        seen.add(id(module))
        for name in node_names(module):
            value = getattr(module, name)
            flat, tree = jax.tree_util.tree_flatten_with_path(value, is_leaf=stops)
            new = []
            for below, item in flat:
                here = (*path, GetAttrKey(name), *below)
                if not isinstance(item, ModuleNode):
                    item = fn(here, module, name, item)
                elif id(item) not in seen:
                    visit(here, item)
                new.append(item)
            if any(a is not b for a, (_, b) in zip(new, flat, strict=True)):
                module.__dict__[name] = jax.tree.unflatten(tree, new)

    visit((), root)


def _unchanged(value: Any) -> Any:
    return value


def copy(
    root: T,
    leaf: Callable[[Any], Any] = _unchanged,
    onto: dict[int, Any] | None = None,
) -> tuple[T, dict[int, Any]]:
    """Copies a tree of modules; arrays and settings are shared, not copied.

    Args:
      root: the outermost module.
      leaf: applied to every leaf of the pytree; modules in static fields keep theirs.
      onto: existing modules to use as copies, by the id of their originals.

    Returns:
      The copy, and every copied module by the id of its original.
    """
    copies: dict[int, Any] = {}
    statics: list[tuple[Any, str, Any]] = []

    def in_node(value: Any) -> Any:
        return one(value) if isinstance(value, ModuleNode) else leaf(value)

    def one(module: ModuleNode) -> Any:
        if id(module) in copies:
            return copies[id(module)]
        new = (onto or {}).get(id(module)) or object.__new__(type(module))
        copies[id(module)] = new
        nodes = set(node_names(module))
        fields = {}
        for name, value in vars(module).items():
            if name in nodes:
                value = jax.tree.map(in_node, value, is_leaf=stops)
            elif name not in PRIVATE:
                statics.append((new, name, value))
            fields[name] = value
        new.__dict__.clear()
        new.__dict__.update(fields)
        return new

    result = in_node(root)
    leaf = _unchanged  # what is met from here on is no part of the pytree
    for new, name, value in statics:  # grows as modules in static fields are copied
        new.__dict__[name] = _map_static(one, value)
    return result, copies


def _map_static(change: Callable[[ModuleNode], Any], value: Any) -> Any:
    """Changes the modules in a static field: itself, or in lists, tuples and dicts."""
    if isinstance(value, ModuleNode):
        return change(value)
    # By class exactly: a named tuple takes its items as separate arguments.
    if type(value) in (list, tuple):
        return type(value)(_map_static(change, item) for item in value)
    if type(value) is dict:
        return {key: _map_static(change, item) for key, item in value.items()}
    return value


def same(left: Any, right: Any) -> bool:
    """Whether two settings are equal; compares the contents of arrays and modules."""
    if left is right:
        return True
    if isinstance(left, ModuleNode):
        if type(left) is not type(right):
            return False
        (a, tree_a), (b, tree_b) = jax.tree.flatten(left), jax.tree.flatten(right)
        return tree_a == tree_b and same(a, b)
    if isinstance(left, (np.ndarray, jax.Array)):
        return _same_array(left, right)
    # ``1 == True == 1.0``, and a trace with one of them is none with another.
    if type(left) is not type(right):
        return False
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(
            same(left[k], right[k]) for k in left
        )
    return bool(left == right)


def _same_array(left: np.ndarray | jax.Array, right: Any) -> bool:
    if not isinstance(right, (np.ndarray, jax.Array)):
        return False
    # ``==`` converts and broadcasts: a zero equals any zeros, of any dtype.
    alike = left.shape == right.shape and left.dtype == right.dtype
    return alike and bool((left == right).all())


class Aux:
    """The static part of a module, which the treedef holds."""

    def __init__(self, names: tuple[str, ...], rest: dict[str, Any]):
        self.names, self.rest = names, rest

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Aux):
            return NotImplemented
        return self.names == other.names and same(self.rest, other.rest)

    def __hash__(self) -> int:
        # The rest may hold lists, dicts and arrays, which have no hash; equal parts
        # have equal names, which is all that a hash must give.
        return hash(self.names)

    def __repr__(self) -> str:
        return ", ".join(self.names)


def flatten_with_keys(
    module: ModuleNode,
) -> tuple[list[tuple[Any, Any]], Aux]:
    """Returns the children by field name; for ``jax.tree_util``."""
    names = node_names(module)
    fields = vars(module)
    rest = {name: v for name, v in fields.items() if name not in names}
    # With the class's defaults: ``module.train()`` has the structure of a module on
    # which nothing was called, and `jax.jit` need not compile it again.
    rest.update((name, getattr(module, name)) for name in PRIVATE)
    children = [(GetAttrKey(name), fields[name]) for name in names]
    return children, Aux(tuple(names), rest)


def flatten(module: ModuleNode) -> tuple[list[Any], Aux]:
    """Returns the children of a module; for ``jax.tree_util``."""
    children, aux = flatten_with_keys(module)
    return [child for _, child in children], aux


def unflattener(cls: type[T]) -> Callable[[Aux, Any], T]:
    """Returns the inverse of ``flatten`` for one class; runs no ``__init__``."""

    def unflatten(aux: Aux, children: Any) -> T:
        # Not ``cls()``: `jax.vmap` unflattens plain objects in the place of arrays,
        # which an ``__init__`` may refuse: https://github.com/jax-ml/jax/issues/12319
        module = object.__new__(cls)
        module.__dict__.update(aux.rest)
        module.__dict__.update(zip(aux.names, children, strict=True))
        return module

    return unflatten
