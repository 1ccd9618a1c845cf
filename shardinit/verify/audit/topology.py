"""Topology: the devices that an audit compiles for, by name, none of them there.

A name says platform, chip and arrangement: ``tpu:v5p:16x16x16`` is the torus of chips,
``gpu:h100:8x8`` hosts by GPUs, ``cpu:8`` simulated devices. The compilers themselves
describe such a system: libtpu for a TPU slice, the CUDA plugin from a description of
the chip. Both want their environment before JAX starts, so a topology is made into
devices in a process of its own (``worker``); reading the name costs nothing.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shardinit.errors import TopologyError
from shardinit.verify.audit.chips import CPU, GPUS, TPUS, Chip

_EXAMPLES = "a name such as tpu:v5p:16x16x16, gpu:h100:8x8 (hosts x devices) or cpu:8"
_LARGEST = 1 << 20
_AXES = {"cpu": (1,), "gpu": (2,), "tpu": (2, 3)}  # how many sizes each may have


@dataclass(frozen=True)
class Topology:
    """A named arrangement of devices.

    Attributes:
      name: as given, such as ``"tpu:v5p:16x16x16"``.
      platform: ``"tpu"``, ``"gpu"`` or ``"cpu"``.
      chip: what each device is.
      sizes: chips along each axis of the torus; hosts and devices a host; or the
        number of devices.

    Example:
      >>> wanted = topology("gpu:h100:8x8")
      >>> wanted.platform, wanted.sizes, wanted.devices
      ('gpu', (8, 8), 64)
    """

    name: str
    platform: str
    chip: Chip
    sizes: tuple[int, ...]

    @property
    def devices(self) -> int:
        """Number of JAX devices."""
        return math.prod(self.sizes) * self.chip.devices


def topology(name: str) -> Topology:
    """Reads the name of a topology.

    Raises:
      TopologyError: it is none; says which there are.

    Example:
      >>> topology("tpu:v5p:16x16x16").devices
      4096
    """
    text = name.strip().lower() if isinstance(name, str) else ""
    platform, *rest = text.split(":")
    if platform not in _AXES:
        raise TopologyError("topology", repr(name), _EXAMPLES)
    chips = {"tpu": TPUS, "gpu": GPUS, "cpu": {"": CPU}}[platform]
    kind = "" if platform == "cpu" else ":".join(rest[:-1])
    if kind not in chips:
        known = ", ".join(chips)
        raise TopologyError("topology", repr(name), f"a chip of {known}: {_EXAMPLES}")
    sizes = _sizes(":".join(rest) if platform == "cpu" else rest[-1])
    if len(sizes) not in _AXES[platform] or not 0 < math.prod(sizes) <= _LARGEST:
        raise TopologyError("topology", repr(name), _EXAMPLES)
    return Topology(name, platform, chips[kind], sizes)


def _sizes(text: str) -> tuple[int, ...]:
    """``8x8`` as numbers; 0 for what is none."""
    return tuple(
        int(n) if re.fullmatch(r"[1-9]\d{0,6}", n) else 0 for n in text.split("x")
    )


# ---- in the process that compiles ----------------------------------------------------


def environment(wanted: Topology, base: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process that compiles for a topology.

    JAX itself runs on CPU there, whatever the machine has: it must not take an
    accelerator that someone is using.

    Example:
      >>> environment(topology("cpu:8"), {"JAX_PLATFORMS": "tpu"})["JAX_PLATFORMS"]
      'cpu'
    """
    # JAX reads these once, when it is imported; the caller's may ask for devices that
    # are in use.
    ours = ("JAX_", "XLA_", "TPU_", "LIBTPU_", "CUDA_VISIBLE")
    env = {k: v for k, v in base.items() if not k.startswith(ours)}
    env["JAX_PLATFORMS"] = "cpu"
    env["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    env["TF_CPP_MIN_LOG_LEVEL"] = "3"
    env["GLOG_minloglevel"] = "3"
    if wanted.platform == "cpu":
        count = f"--xla_force_host_platform_device_count={wanted.devices}"
        env["XLA_FLAGS"] = count
    elif wanted.platform == "tpu":
        # Else libtpu asks the metadata server of Google Cloud which host of a slice
        # this is.
        env["TPU_SKIP_MDS_QUERY"] = "1"
        env["TPU_WORKER_HOSTNAMES"] = "localhost"
        env["TPU_ACCELERATOR_TYPE"] = "v5p-8"  # any will do
        # Else it locks a file, for one process a machine; no chip is opened here.
        env["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    else:
        tools = [p for p in map(_nvidia_bin, sys.path) if os.path.isdir(p)]
        env["PATH"] = os.pathsep.join([*tools, env.get("PATH", os.defpath)])
    return env


def _nvidia_bin(folder: str) -> str:
    """Where the wheel of the CUDA compiler keeps ``ptxas``."""
    return os.path.join(folder, "nvidia", "cuda_nvcc", "bin")


def check_installed(wanted: Topology) -> None:
    """Finds out whether the compiler for a topology is installed.

    Raises:
      TopologyError: it is not; says which extra has it.

    Example:
      >>> check_installed(topology("cpu:8"))  # every JAX has that one
    """
    modules, extra, what = {
        "tpu": (("libtpu",), "tpu", "libtpu"),
        "gpu": (("jax_plugins.xla_cuda12",), "cuda12", "JAX's CUDA plugin"),
        "cpu": ((), "", ""),
    }[wanted.platform]
    for module in modules:
        if not _there(module):
            raise TopologyError(
                wanted.name,
                f"{what} is not installed",
                "the compiler of that platform; no accelerator is needed",
                f"pip install 'shardinit[{extra}]'",
            )


def _there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def devices(wanted: Topology) -> list[Any]:
    """The devices of a topology; for a process that has its ``environment``.

    Raises:
      TopologyError: the compiler does not know such an arrangement.

    Example:
      >>> import jax
      >>> len(devices(topology(f"cpu:{jax.device_count()}"))) == jax.device_count()
      True
    """
    import jax
    from jax.experimental import topologies

    there = jax.devices()  # the CPU backend comes first, or the topology is refused
    if wanted.platform == "cpu":
        return list(there)
    sizes = "x".join(map(str, wanted.sizes))
    if wanted.platform == "tpu":
        platform, name = "tpu", f"{wanted.chip.kind}:{sizes}"
        options = {"chip_config_name": wanted.chip.config} if wanted.chip.config else {}
    else:
        platform, name = "cuda", ""
        options = {"topology": f"1x{sizes}", "target_config": wanted.chip.target}
    try:
        made = topologies.get_topology_desc(name, platform, **options)
    except Exception as error:  # of the plugin's choice
        raise TopologyError(wanted.name, " ".join(str(error).split())[:300]) from error
    found = list(made.devices)
    if len(found) != wanted.devices:
        raise TopologyError(
            wanted.name, f"{len(found)} devices", f"{wanted.devices} of them"
        )
    return found
