"""Front ends: each turns one framework's way of building a model into an `InitFn`.

A front end answers three questions and no more: which pure function of a key gives
the arrays, what the dimensions of each array are called, and how the framework's own
object is made of the arrays again. Every framework is optional and lives behind one
module of this package, which nothing else imports; the modules do not know each other.

>>> import shardinit
>>> from flax import nnx
>>> from shardinit.frontends import nnx as from_nnx
>>> shardinit.plan(from_nnx.init_fn(nnx.Linear, 8, 64)).parameter_count
576
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from shardinit.errors import InitFnError

if TYPE_CHECKING:
    from shardinit.frontends import equinox as equinox
    from shardinit.frontends import haiku as haiku
    from shardinit.frontends import keras as keras
    from shardinit.frontends import linen as linen
    from shardinit.frontends import nnx as nnx
    from shardinit.frontends import optax as optax
    from shardinit.frontends import penzai as penzai
    from shardinit.frontends import torch as torch

_MODULES = (
    "equinox",
    "haiku",
    "keras",
    "linen",
    "nnx",
    "optax",
    "penzai",
    "torch",
)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'shardinit.frontends' has no attribute {name!r}")
    return importlib.import_module(f"shardinit.frontends.{name}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})


def check_arguments(
    where: str, call: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> None:
    """Holds arguments against what a model's own code takes, before that runs.

    Args:
      where: the front end's call, for the error.
      call: the constructor or method.
      args: its positional arguments.
      kwargs: its keyword arguments.

    Raises:
      InitFnError: it does not take them.

    Example:
      >>> from shardinit.frontends import check_arguments
      >>> check_arguments("here", lambda width, *, rngs: width, (8,), {"rngs": 0})
    """
    try:
        if isinstance(call, type):  # its metaclass may take anything, as Flax's does
            call = functools.partial(call.__init__, None)
        signature = inspect.signature(call)
    except (TypeError, ValueError):  # of a builtin
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise InitFnError(
            where, str(error), f"arguments that fit {signature}"
        ) from None
