"""Meshes: what may be passed as one, and the one that stands in where none is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from shardinit.core.init_fn import AnyMesh as AnyMesh
from shardinit.core.ir.jaxpr import no_mesh, setting
from shardinit.core.types import Device
from shardinit.errors import ShardingError


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


def default_device() -> Device:
    """Where arrays lie by default: by ``jax.default_device``, else the first."""
    # Local devices: in a job of several processes `jax.devices()[0]` belongs to the
    # first of them, and no other can put an array there.
    chosen: Any = setting("jax_default_device")
    if isinstance(chosen, str):  # a platform
        return jax.local_devices(backend=chosen)[0]
    return jax.local_devices()[0] if chosen is None else chosen


def as_device(device: Device | str | None) -> Device:
    """A device, the first one of a platform, or for None the default one.

    Raises:
      ShardingError: it is no device, or no such platform is here.
    """
    if device is None:
        return default_device()
    if isinstance(device, jax.Device):
        return device
    try:
        if not isinstance(device, str):
            raise RuntimeError
        return jax.local_devices(backend=device)[0]
    except RuntimeError as error:  # of JAX: a platform that is not here
        here = ", ".join(sorted({d.platform for d in jax.local_devices()}))
        raise ShardingError(
            "device",
            f"got {device!r}",
            f"a device, or the name of a platform that is here ({here})",
            f"Pass {jax.local_devices()[0].platform!r}, or jax.devices()[0]",
        ) from error


def one_device(device: Device | None = None) -> Mesh:
    """The mesh of one device, the default one if none is given: what no mesh means."""
    chosen = default_device() if device is None else device
    return Mesh(np.asarray([chosen]), ("device",))


def one_computes(mesh: AnyMesh) -> bool:
    """Whether one device of a process computes what needs all of a leaf, for all.

    It does where devices share their processor. Accelerators are idle meanwhile, and
    take as long to hand a leaf on as to make it.
    """
    if not isinstance(mesh, Mesh) or mesh.size == 1:
        return False
    return mesh.devices.flat[0].platform == "cpu"


@contextmanager
def alone_on(mesh: Mesh) -> Iterator[None]:
    """A context for what runs on ``mesh``, whatever the caller has set around it.

    Under ``jax.set_mesh`` JAX refuses a computation on other devices than that mesh's,
    and an empty abstract mesh alone does not hide it; ``jax.transfer_guard`` would stop
    the keys' words on their way to the devices, which no user sees.

    Raises:
      ValueError: inside ``jax.jit`` or another transformation.
    """
    # The refusal: "Received incompatible devices for jitted computation. Got argument x
    # of add … and jit's context mesh" (0.10.2 and 0.12.0.1). ``with mesh:`` hides
    # nothing of it: https://github.com/google/orbax/issues/3183
    with jax.set_mesh(mesh), no_mesh(), jax.transfer_guard("allow"):
        yield
