"""Extras: what shardinit can use, and is not installed with the library alone.

The library needs JAX and a few small packages. Frameworks, checkpoints, the service and
the command line each have an extra (``pip install 'shardinit[service]'``). A module
that stands on one imports it inside of `needs`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from shardinit.errors import MissingFrameworkError


@contextmanager
def needs(framework: str, package: str) -> Iterator[None]:
    """Imports of a package: where it is missing, the error says how to get it.

    Args:
      framework: the name that is imported.
      package: what is to be installed: a package, or an extra as ``shardinit[flax]``.

    Raises:
      MissingFrameworkError: (an ``ImportError``) it is not installed.

    Example:
      >>> from shardinit.extras import needs
      >>> with needs("jax", "jax"):
      ...     import jax
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != framework:
            raise
        quoted = f"'{package}'" if "[" in package else package
        raise MissingFrameworkError(
            framework, "it is not installed", remedy=f"pip install {quoted}"
        ) from error
