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

from collections.abc import Iterator
from contextlib import contextmanager

from shardinit.errors import MissingFrameworkError


@contextmanager
def needs(framework: str, package: str) -> Iterator[None]:
    """Imports of a framework: where it is missing, the error says how to get it.

    Args:
      framework: the name that is imported.
      package: the name under which it is installed.

    Raises:
      MissingFrameworkError: (an ``ImportError``) the framework is not installed.

    Example:
      >>> from shardinit.frontends import needs
      >>> with needs("jax", "jax"):
      ...     import jax
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != framework:
            raise
        raise MissingFrameworkError(
            f"the front end for {framework}",
            f"{framework} is not installed",
            remedy=f"pip install {package}",
        ) from error
