"""TreeNode: a frozen dataclass whose fields are the children of a pytree node.

The fields of a class are either children (layers, parameters, arrays) or static (names,
sizes, functions). Flattening, unflattening without a constructor, and the text form
follow from the fields. Static fields are part of the structure of the tree, so they
must be hashable, or pytrees of hashable values. A node without arrays may be a static
argument of ``jax.jit``.

Pytrees are registered class by class, and an undecorated subclass would silently be a
leaf. So a subclass without the decorator is abstract.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Hashable, Sequence
from typing import Any, ClassVar, Self, final

import jax

from shardinit.deferred import rendering
from shardinit.deferred.dataclass import is_pytree_dataclass_type, is_pytree_node_field


class TreeNode(abc.ABC):  # noqa: B024 - a subclass may have abstract methods
    """Base class of pytree dataclasses; decorate subclasses with `pytree_dataclass`."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Raises if the class was not decorated."""
        del args, kwargs
        if not is_pytree_dataclass_type(cls):
            raise TypeError(
                f"{cls.__qualname__} is abstract: it is a Struct that was not "
                f"decorated. Write @pytree_dataclass above the class to make instances"
            )
        return super().__new__(cls)

    @final
    @classmethod
    def from_attributes(cls, **field_values: Any) -> Self:
        """Makes an instance from the values of all fields; runs no ``__init__``.

        Raises:
          ValueError: a field is missing, or a name is not that of a field.
        """
        names = _layout(cls).names
        if len(field_values) != len(names) or any(n not in field_values for n in names):
            missing = [name for name in names if name not in field_values]
            extra = [name for name in field_values if name not in names]
            raise ValueError(
                f"{cls.__qualname__}.from_attributes: missing fields {missing}, "
                f"unknown fields {extra}; expected exactly {list(names)}"
            )
        made = object.__new__(cls)
        vars(made).update(field_values)
        return made

    @final
    def attributes_dict(self) -> dict[str, Any]:
        """Returns all fields by name, in order; the inverse of `from_attributes`."""
        return {name: getattr(self, name) for name in _layout(type(self)).names}

    def key_for_field(self, field_name: str) -> Hashable:
        """Returns the key of a field in key paths; a subclass may override it."""
        return jax.tree_util.GetAttrKey(field_name)

    @final
    def tree_flatten_with_keys(self) -> tuple[Sequence[tuple[Any, Any]], Any]:
        """Returns the children with keys, in the order of the fields, and the rest.

        Returns:
          Pairs of key and child, and the ``aux_data`` that `tree_unflatten` takes.
        """
        children, aux = self.tree_flatten()
        names = _layout(type(self)).children
        pairs = zip(map(self.key_for_field, names), children, strict=True)
        return tuple(pairs), aux

    @final
    def tree_flatten(self) -> tuple[Sequence[Any], Any]:
        """Returns the children in the order of the fields, and the static fields."""
        layout = _layout(type(self))
        children = tuple([getattr(self, name) for name in layout.children])
        static = tuple([getattr(self, name) for name in layout.static])
        return children, StaticFields(layout, static)

    @final
    @classmethod
    def tree_unflatten(cls, aux_data: Any, children: Sequence[Any]) -> Self:
        """Makes an instance from ``aux_data`` and children; runs no ``__init__``."""
        # No ``__init__``: `jax.vmap` unflattens plain objects in the place of arrays,
        # which its checks may refuse: https://github.com/jax-ml/jax/issues/12319
        layout = aux_data.layout
        made = object.__new__(cls)
        vars(made).update(zip(layout.static, aux_data.values, strict=True))
        vars(made).update(zip(layout.children, children, strict=True))
        return made

    def _structural_hash(self) -> int:
        names = _layout(type(self)).names
        return _hash_fields(type(self), names, [getattr(self, n) for n in names])

    _color: ClassVar[str] = "transparent"

    def treescope_color(self) -> str:
        """Returns the CSS colour of this object in treescope."""
        return self._color

    def __treescope_repr__(self, path: str | None, subtree_renderer: Any) -> Any:
        return rendering.in_treescope(self, path, subtree_renderer)

    def __repr__(self) -> str:
        return rendering.as_text(self)


def one_level(node: Any) -> tuple[list[tuple[Any, Any]], Any] | None:
    """Returns the children with keys and the treedef of one node; None for a leaf."""
    pairs, treedef = jax.tree_util.tree_flatten_with_path(
        node, is_leaf=lambda inner: inner is not node
    )
    if len(pairs) == 1 and pairs[0][0] == ():
        return None
    return [(path[0], child) for path, child in pairs], treedef


@dataclasses.dataclass(frozen=True)
class Layout:
    """The field names of a class: all of them, the children, the static ones."""

    cls: type
    names: tuple[str, ...]
    children: tuple[str, ...]
    static: tuple[str, ...]


@functools.cache
def _layout(cls: Any) -> Layout:
    fields = dataclasses.fields(cls)
    return Layout(
        cls,
        tuple(f.name for f in fields),
        tuple(f.name for f in fields if is_pytree_node_field(f)),
        tuple(f.name for f in fields if not is_pytree_node_field(f)),
    )


@dataclasses.dataclass(repr=False, slots=True)  # made at every flattening: not frozen
class StaticFields:
    """The static fields of a struct, as a part of its treedef.

    A value that is not hashable, such as a dict of shapes, is hashed as a pytree.

    Attributes:
      layout: the field names of the class.
      values: the values of the static fields, in order.
    """

    layout: Layout
    values: tuple[Any, ...]

    def __hash__(self) -> int:
        return _hash_fields(self.layout.cls, self.layout.static, self.values)

    def __repr__(self) -> str:
        pairs = zip(self.layout.static, self.values, strict=True)
        return "(" + ", ".join(f"{name}={value!r}" for name, value in pairs) + ")"


def _hash_fields(cls: type, names: Sequence[str], values: Sequence[Any]) -> int:
    hashes = []
    for name, value in zip(names, values, strict=True):
        try:
            hashes.append(_hash(value))
        except TypeError as error:
            raise TypeError(
                f"{cls.__qualname__}.{name} cannot be hashed ({error}); what is "
                f"static must be a pytree of hashable things, and a struct that is "
                f"a static argument must hold no arrays"
            ) from error
    return hash((cls, *hashes))


def _hash(value: Any) -> int:
    """Hashes a value, or its children if it is a dict or a list."""
    try:
        return hash(value)
    except TypeError:
        level = one_level(value)
        if level is None:
            raise
        return hash((type(value), *[(key, _hash(child)) for key, child in level[0]]))
