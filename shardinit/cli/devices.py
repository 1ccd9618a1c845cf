"""Devices: what this process tells JAX before JAX is imported, and what it then has."""

from __future__ import annotations

import math
import os
from typing import Any

from shardinit.core.platform import with_cpu_devices
from shardinit.errors import ShardingError


def on_cpu() -> None:
    """For commands that trace and compute on the host: they take no accelerator."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")


def simulate(count: int) -> None:
    """Makes this process, and its children, see ``count`` CPU devices."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = with_cpu_devices(flags, count)


def simulate_where_asked(axes: dict[str, int]) -> None:
    """Where JAX is told to use the CPU, gives it as many devices as the mesh has."""
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        simulate(math.prod(axes.values()))


def real_mesh(axes: dict[str, int]) -> Any:
    """A mesh of the first devices that are there.

    Raises:
      ShardingError: there are fewer devices.
    """
    import jax
    import numpy as np

    wanted, devices = math.prod(axes.values()), jax.devices()
    if wanted > len(devices):
        raise ShardingError(
            "--mesh",
            f"{wanted} devices in {axes}",
            f"no more than the {len(devices)} that are there",
            "With JAX_PLATFORMS=cpu they are simulated",
        )
    shape = tuple(axes.values())
    return jax.sharding.Mesh(np.array(devices[:wanted]).reshape(shape), tuple(axes))
