"""Example inputs: what a lazily initialised model is shown beside the key.

An initialiser sees the shapes of its inputs, hardly ever the values. Inputs that do not
matter become zeros made inside the traced function, which nothing reads and which
therefore cost nothing; they need not exist at all, a `jax.ShapeDtypeStruct` will do. An
input that a variable depends on (data-dependent initialisation, a loss that is sown) is
kept if it is an array, and refused by the name of the variable if it is only a shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from shardinit.core.ir import jaxpr as jx
from shardinit.core.ir.dependencies import Traced, stand_in
from shardinit.core.prng.root_key import RootKey
from shardinit.core.types import Init, Tree, Values
from shardinit.errors import InitFnError


class Examples:
    """Positional and keyword arguments of an init function, its key apart.

    Args:
      args: any pytrees of arrays or `jax.ShapeDtypeStruct`; other leaves, typed keys
        among them, are passed on as they are.
      kwargs: likewise.

    Raises:
      InitFnError: no argument is an array, and one is a tuple of numbers as a shape is.
    """

    def __init__(self, args: Sequence[Tree], kwargs: dict[str, Tree]):
        _refuse_shapes(args, kwargs)
        self._leaves, self._structure = jax.tree.flatten((tuple(args), kwargs))
        self._places = [i for i, x in enumerate(self._leaves) if _is_array(x)]
        given = [self._leaves[i] for i in self._places]
        self._shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in given]
        self._kept: dict[int, Values] = {}

    def arguments(self, values: Sequence[Values]) -> tuple[tuple, dict[str, Tree]]:
        """The arguments with these values for their arrays, in order."""
        filled = list(self._leaves)
        for place, value in zip(self._places, values, strict=True):
            filled[place] = value
        return jax.tree.unflatten(self._structure, filled)

    def bound(self, fn: Callable[[Tree, list[Values]], Tree], name: str) -> Init:
        """The init function of the key alone: keeps the arrays that matter to it.

        The user's code runs once, here; the function that is returned runs what was
        traced. It runs the code anew for a key of another kind, and where 64-bit types
        were switched since.

        Args:
          fn: from a key, or keys by name, and the arrays' values to a pytree of arrays.
          name: of the model.

        Raises:
          InitFnError: a leaf depends on an array of which only the shape is known.
        """
        key_aval, x64 = jax.eval_shape(jax.random.key, 0), jx.setting("jax_enable_x64")
        traced = Traced(fn, key_aval, self._shapes)
        self._keep(traced, name)

        def init(key: RootKey) -> Tree:
            # Zeros for the others are made in here, where nothing reads them.
            values = [
                self._kept.get(i, stand_in(x)) for i, x in enumerate(self._shapes)
            ]
            if not isinstance(key, dict):  # not keys by the names of streams
                kind = (key.dtype, key.shape, jx.setting("jax_enable_x64"))
                if kind == (key_aval.dtype, key_aval.shape, x64):
                    return traced(key, values)
            return fn(key, values)

        return init

    def _keep(self, traced: Traced, name: str) -> None:
        for number, path in traced.dependencies().items():
            self._kept[number] = self._leaves[self._places[number]]
            if isinstance(self._kept[number], jax.ShapeDtypeStruct):
                raise InitFnError(
                    path,
                    f"this variable of {name} depends on the values of an input, of "
                    "which only the shape was given",
                    "variables that depend on the shapes alone",
                    "Pass arrays instead of jax.ShapeDtypeStruct",
                )


def _refuse_shapes(args: Sequence[Tree], kwargs: dict[str, Tree]) -> None:
    """Refuses shapes in the place of inputs: taken as numbers, they have other shapes.

    A shape beside an array is an argument of its own, and so is one by keyword.
    """
    if any(map(_is_array, jax.tree.leaves((args, kwargs)))):
        return
    for given in args:
        is_shape = isinstance(given, tuple | list) and all(
            isinstance(size, int) and not isinstance(size, bool) for size in given
        )
        if is_shape and given:
            shape = tuple(given)
            raise InitFnError(
                "inputs",
                f"got {given}, numbers in the place of an input",
                "an array or its shape and dtype",
                f"Pass jax.ShapeDtypeStruct({shape}, jnp.float32); a static argument "
                "that is a tuple is given by keyword",
            )


def _is_array(x: object) -> bool:
    dtype = getattr(x, "dtype", None)
    if dtype is None or not hasattr(x, "shape"):
        return False
    return not jnp.issubdtype(dtype, jax.dtypes.extended)
