"""Devices: what this process tells JAX before JAX is imported, and what it then has."""

from __future__ import annotations

import math
import os
from typing import Any

from shardinit.cli.outcomes import UsageError
from shardinit.core.platform import with_cpu_devices
from shardinit.errors import ShardingError, ShardinitError


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


def join(text: str, axes: dict[str, int] | None) -> None:
    """Makes this process one of a ``jax.distributed`` job.

    Args:
      text: ``auto`` on a cluster that JAX knows, or the address of process 0, how many
        processes there are, and which of them this is: ``host0:8476,4,0``.
      axes: the mesh; on the CPU its devices are simulated, an equal part in each.

    Raises:
      UsageError: it does not read like that.
      ShardinitError: the job does not come together.
    """
    given: tuple[Any, ...] = ()
    if text != "auto":
        address, *numbers = text.split(",")
        right = ":" in address and len(numbers) == 2 and all(map(str.isdigit, numbers))
        given = (address, *map(int, numbers)) if right else ()
        if not right or not given[2] < given[1]:
            raise UsageError(
                "--distributed",
                repr(text),
                "auto, or HOST:PORT,PROCESSES,THIS, such as host0:8476,4,0",
            )
        if axes is not None and math.prod(axes.values()) % given[1] == 0:
            simulate_where_asked({"each": math.prod(axes.values()) // given[1]})
    import jax

    try:
        jax.distributed.initialize(*given)
    except (ValueError, RuntimeError) as error:
        said = " ".join(str(error).split())
        raise ShardinitError(
            f"--distributed {text}", said, "a job whose processes all come"
        ) from error


def is_first() -> bool:
    """Whether this is the process of its job that speaks for all."""
    import jax

    return jax.process_index() == 0


def real_mesh(axes: dict[str, int] | None) -> Any:
    """A mesh of the first devices that are there; for None one, or all of a job.

    Raises:
      ShardingError: there are fewer devices.
    """
    import jax
    import numpy as np

    if axes is None:
        axes = {"device": jax.device_count() if jax.process_count() > 1 else 1}
    wanted, devices = math.prod(axes.values()), jax.devices()
    if wanted > len(devices):
        raise ShardingError(
            "--mesh",
            f"{wanted} devices in {axes}",
            f"no more than the {len(devices)} that are there",
            "With JAX_PLATFORMS=cpu they are simulated",
        )
    if jax.process_count() > 1 and wanted < len(devices):
        raise ShardingError(
            "--mesh", f"{wanted} devices in {axes}", f"all {len(devices)} of the job"
        )
    shape = tuple(axes.values())
    return jax.sharding.Mesh(np.array(devices[:wanted]).reshape(shape), tuple(axes))
