"""One entry of a ``PartitionSpec``: the mesh axes that one dimension is cut along.

JAX writes an entry as None, as the name of a mesh axis, or as a tuple of names. Here
it is always read as a tuple, empty where the dimension lies whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a client without JAX prints descriptions
    from jax.sharding import NamedSharding

MeshAxes = str | tuple[str, ...] | None


def mesh_axes(entry: str | Iterable[str] | None) -> tuple[str, ...]:
    """The mesh axes of one entry.

    Example:
      >>> mesh_axes(None), mesh_axes("data"), mesh_axes(("data", "model"))
      ((), ('data',), ('data', 'model'))
    """
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def mesh_axes_of(spec: Iterable[str | Iterable[str] | None]) -> list[str]:
    """The mesh axes of all entries of a spec."""
    return [axis for entry in spec for axis in mesh_axes(entry)]


def as_entry(axes: Iterable[str]) -> MeshAxes:
    """The entry that names ``axes``, as JAX writes it: the inverse of ``mesh_axes``."""
    names = tuple(axes)
    return None if not names else names[0] if len(names) == 1 else names


def parts(entry: str | Iterable[str] | None, sizes: Mapping[str, int]) -> int:
    """Into how many parts an entry cuts its dimension, on a mesh of those sizes."""
    return math.prod(sizes[name] for name in mesh_axes(entry))


def other_memory(sharding: NamedSharding | None) -> str:
    """The kind of memory that a sharding names, or "" where it is the device's own."""
    kind = None if sharding is None else sharding.memory_kind
    return "" if kind in (None, "device") else kind
