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
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from shardinit.errors import InitFnError


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
