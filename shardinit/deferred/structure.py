"""Structures: the shapes, dtypes and axis names of values.

The structure of a value is the same tree with a shape, a dtype and, where known, axis
names at each leaf. With it a model can be planned, restored and checked without arrays.
A check never casts: a float64 in place of a float32 is an error that has the path
inside the value.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from shardinit.core.init_fn import axis_names
from shardinit.core.ir.jaxpr import setting
from shardinit.core.paths import path_str
from shardinit.deferred.node import one_level
from shardinit.errors import StructureMismatchError

T = TypeVar("T")
Axes = tuple[str | None, ...]
Structure = Any
"""A pytree of `AbstractArray`."""


class AbstractArray(jax.ShapeDtypeStruct):
    """Shape and dtype of an array, and the names of its axes where they are known.

    Attributes:
      axes: a logical axis name, or None, for each dimension; None if unknown.

    Example:
      >>> import jax.numpy as jnp
      >>> from shardinit import deferred
      >>> deferred.AbstractArray((8, 4), jnp.float32, ("embed", None))
      AbstractArray((8, 4), float32, axes=('embed', None))
    """

    def __init__(self, shape: Any, dtype: Any, axes: Axes | None = None):
        super().__init__(tuple(shape), dtype)
        if axes is not None and len(axes) != len(self.shape):
            raise StructureMismatchError(
                "value_structure",
                f"axis names {tuple(axes)} for the shape {self.shape}",
                "one name (or None) for each dimension",
            )
        self.axes = None if axes is None else tuple(axes)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, jax.ShapeDtypeStruct):
            return NotImplemented
        axes = getattr(other, "axes", None)
        mine = (self.shape, self.dtype, self.axes)
        return mine == (other.shape, other.dtype, axes)

    def __hash__(self) -> int:
        return hash((self.shape, self.dtype))

    def __repr__(self) -> str:
        axes = "" if self.axes is None else f", axes={self.axes}"
        return f"AbstractArray({self.shape}, {self.dtype}{axes})"

    # `jax.ShapeDtypeStruct` sets both, so one of them alone would not be ours.
    __str__ = __repr__


@dataclass(frozen=True)
class WithAxes(Generic[T]):
    """An initializer with logical axis names for its array.

    Attributes:
      initializer: maps a key to one array.
      axes: a logical axis name, or None, for each dimension.
    """

    initializer: Callable[[jax.Array], T]
    axes: Axes

    def __call__(self, key: jax.Array) -> T:
        """Returns the array for a key."""
        return self.initializer(key)

    def __repr__(self) -> str:
        shown = getattr(self.initializer, "__qualname__", repr(self.initializer))
        return f"with_axes(<{shown}>, {self.axes})"


def with_axes(
    initializer: Callable[[jax.Array], T], axes: Axes
) -> Callable[[jax.Array], T]:
    """Adds logical axis names, for `AxisRules`, to an initializer of one array.

    Example:
      >>> import jax
      >>> from shardinit import deferred
      >>> normal = deferred.with_axes(
      ...     lambda key: jax.random.normal(key, (8, 4)), ("embed", "mlp")
      ... )
      >>> deferred.UninitializedParameter(normal, "weight").value_structure
      AbstractArray((8, 4), float32, axes=('embed', 'mlp'))
    """
    return WithAxes(initializer, tuple(axes))


def infer(initializer: Callable[[jax.Array], Any]) -> Structure:
    """Infers the structure of an initializer's result by ``jax.eval_shape``."""
    abstract = jax.eval_shape(initializer, _abstract_key())
    return structure_of(abstract, getattr(initializer, "axes", None))


@functools.cache
def _key_struct(impl: str) -> Any:
    return jax.eval_shape(functools.partial(jax.random.key, impl=impl), 0)


def _abstract_key() -> Any:
    return _key_struct(str(setting("jax_default_prng_impl")))


def structure_of(value: Any, axes: Axes | None = None) -> Structure:
    """Returns the structure of a concrete or abstract value; never raises.

    Args:
      value: a pytree; leaves that are not arrays are returned unchanged.
      axes: names of the dimensions of ``value``, if it is one array.
    """

    def leaf(node: Any, names: Axes | None) -> Any:
        if isinstance(node, AbstractArray) and names is None:
            return node
        if hasattr(node, "shape") and hasattr(node, "dtype"):
            return AbstractArray(node.shape, node.dtype, names)
        if isinstance(node, bool | int | float | complex):
            return AbstractArray((), jnp.result_type(node), names)
        return node

    def inside(node: Any) -> Any:
        names = axis_names(node)
        if names is None:
            return leaf(node, axes)
        return jax.tree.map(lambda x: leaf(x, names), node)

    return jax.tree.map(inside, value, is_leaf=lambda n: axis_names(n) is not None)


def declared(where: str, pattern: Any) -> Structure:
    """Returns the structure that a ``value_structure`` given by the user stands for.

    Args:
      where: the name of the parameter in errors.
      pattern: a pytree of objects with a shape and a dtype; Penzai's ``ArraySpec``,
        which JAX takes for a node without children, is one too.

    Raises:
      StructureMismatchError: an ``ArraySpec`` has variable dimensions or a dtype that
        is only a kind of dtypes.
    """

    def is_spec(node: Any) -> bool:
        return hasattr(node, "into_pytree") and hasattr(node, "named_shape")

    def concrete(node: Any) -> Any:
        if not is_spec(node):
            return node
        sizes = (*node.shape, *node.named_shape.values())
        # A kind of dtypes is a class of NumPy's with subclasses, as ``np.floating``,
        # which ``np.float32`` has not.
        abstract = isinstance(node.dtype, type) and issubclass(node.dtype, np.generic)
        abstract = abstract and bool(node.dtype.__subclasses__())
        if abstract or not all(isinstance(size, int) for size in sizes):
            raise StructureMismatchError(
                where,
                f"an ArraySpec with {'a kind of dtype' if abstract else 'free sizes'}",
                "sizes and one dtype",
                "Leave value_structure out to infer it from the initializer",
            )
        return node.into_pytree()

    return structure_of(jax.tree.map(concrete, pattern, is_leaf=is_spec))


def axes_of(structure: Structure) -> Any:
    """Returns the same tree with the axis names of each leaf, None if unknown."""
    return jax.tree.map(lambda leaf: getattr(leaf, "axes", None), structure)


def empty_of(structure: Structure) -> Any:
    """Returns the same tree with a ``jax.ShapeDtypeStruct`` at each leaf."""

    def plain(leaf: Any) -> Any:
        if isinstance(leaf, AbstractArray):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        return leaf

    return jax.tree.map(plain, structure)


def check(where: str, value: Any, structure: Structure, *, dtypes: bool = True) -> None:
    """Raises if a value does not have a structure.

    Args:
      where: the name of the value in errors, such as ``"parameter 'embed.table'"``.
      value: a pytree of arrays.
      structure: the expected structure.
      dtypes: whether the dtypes must be the same too.

    Raises:
      StructureMismatchError: there is a difference; it has the path of the first.
    """
    for path, got, expected in _differences(value, structure, (), dtypes):
        at = path_str(path)
        raise StructureMismatchError(
            f"{where} at {at!r}" if at else where,
            got,
            expected,
            "Values are never cast; convert it, or pass strict_dtype=False"
            if got.startswith("dtype")
            else "",
        )


Difference = tuple[tuple[Hashable, ...], str, str]


def _differences(
    value: Any, structure: Any, path: tuple[Any, ...], dtypes: bool
) -> Iterator[Difference]:
    """Yields the differences between two trees, outer nodes first."""
    mine, theirs = one_level(value), one_level(structure)
    if theirs is None:
        if mine is None:
            yield from _leaf_differences(value, structure, path, dtypes)
        else:
            yield path, _tree(value), _kind(structure)
    elif mine is None:
        yield path, _kind(value), _tree(structure)
    elif mine[1] != theirs[1]:
        yield path, _tree(value), _tree(structure)
    else:
        for (key, a), (_, b) in zip(mine[0], theirs[0], strict=True):
            yield from _differences(a, b, (*path, key), dtypes)


def _leaf_differences(
    value: Any, expected: Any, path: tuple[Any, ...], dtypes: bool
) -> Iterator[Difference]:
    if not hasattr(expected, "shape"):
        if value != expected:
            yield path, repr(value), repr(expected)
        return
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if isinstance(value, bool | int | float | complex) and not dtypes:
        shape, dtype = (), expected.dtype
    if shape is None or dtype is None:
        yield path, f"{_kind(value)}, which is no array", _kind(expected)
    elif tuple(shape) != tuple(expected.shape):
        yield path, f"shape {tuple(shape)}", f"shape {tuple(expected.shape)}"
    elif dtypes and dtype != expected.dtype:
        yield path, f"dtype {dtype}", f"dtype {expected.dtype}"


def _tree(node: Any) -> str:
    return _kind(node) if node is None else f"a tree ({_kind(node)})"


def _kind(node: Any) -> str:
    if hasattr(node, "shape") and hasattr(node, "dtype"):
        return f"an array {node.dtype}{list(node.shape)}"
    if isinstance(node, dict):
        return f"a dict with the keys {sorted(map(str, node))}"
    if isinstance(node, list | tuple):
        return f"a {type(node).__name__} of {len(node)}"
    return "None" if node is None else f"a {type(node).__name__}"


def as_arrays(value: Any) -> Any:
    """Converts numbers and NumPy arrays to JAX arrays, with the dtypes of a trace."""

    def convert(leaf: Any) -> Any:
        if isinstance(leaf, np.ndarray | np.generic | bool | int | float | complex):
            return jnp.asarray(leaf)
        return leaf

    return jax.tree.map(convert, value)
