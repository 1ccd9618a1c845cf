"""InitFn: the waist that every front end meets.

A model's initial state is a pure function of a key. A front end (Flax, Equinox, a
deferred tree, a model spec) says no more than that function, the logical axis names
of its leaves, and how the user's own object is made from the arrays again. All that
follows (the plan, the programs, windows, digests) knows nothing of the framework.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from shardinit.core.systems import refuse_models


def identity(tree: Any) -> Any:
    """Returns ``tree``: the ``rebuild`` of a function whose result is the model."""
    return tree


def axis_names(node: Any) -> tuple[str | None, ...] | None:
    """The names of the dimensions of an array that comes in a box which has them.

    Args:
      node: any node of a pytree; Flax's boxes and Penzai's named arrays have names.

    Returns:
      A name, or None, for each dimension; None if ``node`` is no such box.
    """
    names = getattr(node, "names", None)
    inner: Any = getattr(node, "value", None)
    if isinstance(names, tuple) and hasattr(inner, "shape"):
        return (*names, *[None] * (len(inner.shape) - len(names)))
    known: Any = getattr(node, "named_axes", None)
    data: Any = getattr(node, "data_array", None)
    if isinstance(known, dict) and hasattr(data, "shape"):  # names of the last axes
        return (*[None] * (len(data.shape) - len(known)), *map(str, known))
    return None


@dataclass(frozen=True)
class InitFn:
    """A function from a key to a pytree of arrays, with what a front end knows of it.

    Attributes:
      fn: ``key -> pytree of arrays``; pure, traceable by ``jax.make_jaxpr``.
      axes: a pytree shaped like ``fn``'s result, each leaf a tuple with one logical
        axis name (or None) for each dimension, or None where nothing is known;
        None when no leaf has names.
      rebuild: turns the pytree of arrays into the user's own object.
      name: what to call the model in tables and errors.
    """

    fn: Callable[[jax.Array], Any]
    axes: Any = None
    rebuild: Callable[[Any], Any] = identity
    name: str = "init"

    def __call__(self, key: jax.Array) -> Any:
        """Returns ``rebuild(fn(key))``: the plain, unsharded initialisation."""
        return self.rebuild(self.fn(key))


def as_init_fn(fn: Any) -> InitFn:
    """Wraps a plain callable; returns an ``InitFn`` as it is.

    Raises:
      InitFnError: (a ``TypeError``) ``fn`` is a model of which a front end makes an
        init function.
      TypeError: ``fn`` is not callable.
    """
    if isinstance(fn, InitFn):
        return fn
    refuse_models(fn)
    if not callable(fn):
        raise TypeError(
            f"an init function is a callable `key -> pytree of arrays`, an InitFn or "
            f"an InitProgram; got {type(fn).__name__}"
        )
    return InitFn(fn, name=getattr(fn, "__name__", type(fn).__name__))
