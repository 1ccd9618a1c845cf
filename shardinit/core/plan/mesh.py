"""Meshes: what may be passed as one, and the one that stands in where none is."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from shardinit.errors import ShardingError

AnyMesh = Mesh | AbstractMesh


def check_mesh(mesh: object) -> None:
    """Holds what was passed as a mesh against what is one.

    Raises:
      ShardingError: it is none.
    """
    if mesh is not None and not isinstance(mesh, Mesh | AbstractMesh):
        raise ShardingError(
            "mesh",
            f"got {type(mesh).__name__}",
            "a jax.sharding.Mesh or AbstractMesh",
            'Make one with jax.make_mesh((2, 4), ("data", "model"))',
        )


def one_device(device: Any = None) -> Mesh:
    """The mesh of one device, by default this process's first: what no mesh means."""
    chosen = jax.local_devices()[0] if device is None else device
    return Mesh(np.asarray([chosen]), ("device",))
