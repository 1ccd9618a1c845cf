"""What core's functions take and give: arrays, coordinates, trees and dimensions.

The annotations are jaxtyping's. Nothing checks them at run time in a user's process;
the tests have beartype do so for every function of core.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import numpy as np
from jaxtyping import PyTree, Shaped, UInt32

if (
    TYPE_CHECKING
):  # to a type checker the arrays of JAX and numpy have nothing in common
    Array: TypeAlias = Any
    Device: TypeAlias = Any  # nor does it see that these two names are classes
    TreeDef: TypeAlias = Any
else:
    Array = jax.Array | np.ndarray | np.generic
    """An array, a tracer, or numpy's array or scalar."""
    Device = jax.Device
    TreeDef = jax.tree_util.PyTreeDef

Values: TypeAlias = Shaped[Array, "..."]
"""An array of any shape and dtype; typed keys among them."""

Words: TypeAlias = UInt32[Array, "..."]
"""Unsigned 32-bit words: of keys, counters, or coordinates along one axis."""

Elements: TypeAlias = Values | tuple[Words, ...]
"""Elements of a value at coordinates; those of keys as their words."""

Coords: TypeAlias = tuple[Words, ...]
"""One index array an axis; they broadcast to the shape of the grid."""

Dim: TypeAlias = Any
"""A size: an int, or a symbolic dimension of jax.export, whose class is private."""

DType: TypeAlias = Any
"""A numpy dtype, or the extended dtype of typed keys, whose class is private."""

Leaf: TypeAlias = Values | jax.ShapeDtypeStruct
"""A leaf of what an init returns; its shape alone where ``select`` left it out."""

Tree: TypeAlias = PyTree
"""A user's pytree."""

Init: TypeAlias = Callable[..., Any]
"""What may be initialised: an InitFn, an InitProgram, or a function of a key."""
