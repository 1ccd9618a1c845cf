"""Doctor: what is installed here, what of it is wrong, and the line that mends it.

It needs the library alone, and asks nothing of JAX but its devices and settings.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import Any

from packaging.requirements import Requirement

from shardinit.version import __version__

_FOR_PEOPLE = ("flax", "checkpoint", "service", "cli", "torch", "tpu", "cuda12")
_ABOUT = "Says what is installed, what of it is wrong, and the line that mends it."
_SHOWN = ("jax", "jaxlib", "numpy", "ml_dtypes", "flax", "orbax-checkpoint", "grpcio")


@dataclass(frozen=True)
class Fault:
    """What is wrong, and the line that mends it.

    Example:
      >>> print(Fault("jax 0.4 is here, jax>=0.10.2 is needed", "pip install -U jax"))
      jax 0.4 is here, jax>=0.10.2 is needed
          pip install -U jax
    """

    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.what}\n    {self.remedy}"


@dataclass(frozen=True)
class Diagnosis:
    """What was found.

    Attributes:
      versions: by distribution, of those that are installed.
      devices: their kinds, with how many there are of each.
      platform: JAX's default backend; empty where it has none.
      extras: by extra, what of it is not installed; empty where all is.
      faults: what is wrong.

    Example:
      >>> found = examine()
      >>> found.versions["shardinit"] == __version__, found.platform
      (True, 'cpu')
    """

    versions: dict[str, str]
    devices: dict[str, int]
    platform: str
    extras: dict[str, list[str]]
    faults: list[Fault] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong; an extra that is not installed is no fault."""
        return not self.faults

    def __str__(self) -> str:
        versions = [f"  {name} {version}" for name, version in self.versions.items()]
        devices = [f"  {count} x {kind}" for kind, count in self.devices.items()]
        extras = [f"  {name:<11} {_state(name, x)}" for name, x in self.extras.items()]
        faults = [f"  {fault}" for fault in self.faults] or ["  nothing"]
        parts = {
            "versions": versions,
            f"devices ({self.platform or 'no backend'})": devices or ["  none"],
            "extras": extras,
            "wrong": faults,
        }
        return "\n".join(line for title in parts for line in (title, *parts[title]))


def _state(extra: str, lacking: Sequence[str]) -> str:
    return f"pip install 'shardinit[{extra}]'" if lacking else "installed"


def examine() -> Diagnosis:
    """Looks at this process: versions, extras, devices and JAX's settings.

    Example:
      >>> sorted(examine().extras)[:2]
      ['checkpoint', 'cli']
    """
    versions = {"shardinit": __version__, "python": platform.python_version()}
    versions |= {name: v for name in _SHOWN if (v := _version(name)) is not None}
    faults, required = [], _required()
    for requirement in required.get("", ()):
        faults += _unmet(requirement, "")
    extras: dict[str, list[str]] = {}
    for extra in _FOR_PEOPLE:
        wanted = required.get(extra, [])
        extras[extra] = [x.name for x in wanted if _version(x.name) is None]
        for requirement in wanted:
            if _version(requirement.name) is not None:
                faults += _unmet(requirement, extra)
    if not required:
        remedy = "pip install shardinit"
        faults.append(
            Fault("shardinit is imported from a folder, not installed", remedy)
        )
        extras = {}
    devices, backend = _devices(faults)
    return Diagnosis(versions, devices, backend, extras, faults)


def version_line() -> str:
    """What ``--version`` prints.

    Example:
      >>> version_line().startswith(f"shardinit {__version__} (jax ")
      True
    """
    versions = (f"{name} {_version(name)}" for name in ("jax", "jaxlib"))
    return f"shardinit {__version__} ({', '.join(versions)})"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _required() -> dict[str, list[Requirement]]:
    """What the library and each extra require on this platform, as pyproject says.

    An extra that is made of others (``shardinit[all]``) has what is its own alone.
    """
    try:
        found = [Requirement(text) for text in metadata.requires("shardinit") or ()]
    except metadata.PackageNotFoundError:
        return {}
    required: dict[str, list[Requirement]] = {}
    for extra in ("", *_FOR_PEOPLE):
        for requirement in found:
            marker = requirement.marker
            alone = marker is None or marker.evaluate({"extra": ""})
            taken = marker is None or marker.evaluate({"extra": extra})
            if taken and (alone is (extra == "")):
                required.setdefault(extra, []).append(_plain(requirement, extra))
    return required


def _plain(requirement: Requirement, extra: str) -> Requirement:
    """What an extra of JAX's really brings."""
    brings = {"tpu": "libtpu", "cuda12": "jax-cuda12-plugin"}
    return Requirement(brings[extra]) if extra in brings else requirement


def _unmet(requirement: Requirement, extra: str) -> Iterator[Fault]:
    version = _version(requirement.name)
    package = f"'shardinit[{extra}]'" if extra else "shardinit"
    wanted = f"{requirement.name}{requirement.specifier}"
    if version is None:
        yield Fault(f"{wanted} is not installed", f"pip install {package}")
    elif not requirement.specifier.contains(version, prereleases=True):
        what = f"{requirement.name} {version} is here, and {wanted} is needed"
        yield Fault(what, f"pip install --upgrade {package}")


def _devices(faults: list[Fault]) -> tuple[dict[str, int], str]:
    try:
        import jax

        devices = jax.devices()
    except Exception as error:  # a backend that does not start raises what it likes
        text = " ".join(str(error).split())
        wanted = os.environ.get("JAX_PLATFORMS")
        remedy = "export JAX_PLATFORMS=cpu"
        if wanted:
            remedy = f"unset JAX_PLATFORMS, which is {wanted!r}; or {remedy}"
        faults.append(Fault(f"JAX has no devices: {text}", remedy))
        return {}, ""
    faults += _settings(jax.config)
    kinds: dict[str, int] = {}
    for device in devices:
        kinds[device.device_kind] = kinds.get(device.device_kind, 0) + 1
    backend = jax.default_backend()
    for extra, there in (("cuda12", "/dev/nvidia0"), ("tpu", "/dev/accel0")):
        if backend == "cpu" and os.path.exists(there):
            what = f"there is {there}, and JAX uses the CPU"
            faults.append(Fault(what, f"pip install 'shardinit[{extra}]'"))
    return kinds, backend


def _settings(config: Any) -> Iterator[Fault]:
    """Settings of JAX under which `shardinit.plan` refuses."""
    if not config.jax_threefry_partitionable:
        yield Fault(
            "jax_threefry_partitionable is off: no device could make its shard alone",
            'jax.config.update("jax_threefry_partitionable", True)',
        )
    if config.jax_disable_jit:
        what = "jax_disable_jit is on: leaves are made by compiled programs"
        yield Fault(what, 'jax.config.update("jax_disable_jit", False)')


def main(arguments: Sequence[str]) -> int:
    """``python -m shardinit doctor``; the exit code: 1 if something is wrong.

    Example:
      >>> import contextlib, io
      >>> with contextlib.redirect_stdout(io.StringIO()) as said:
      ...     code = main(["--json"])
      >>> json.loads(said.getvalue())["versions"]["shardinit"] == __version__
      True
    """
    parser = argparse.ArgumentParser("shardinit doctor", description=_ABOUT)
    parser.add_argument("--json", action="store_true", help="All of it, as JSON.")
    return report(as_json=parser.parse_args(arguments).json)


def report(*, as_json: bool) -> int:
    """Says what is installed, what of it is wrong, and the line that mends it.

    Example:
      >>> import contextlib, io
      >>> with contextlib.redirect_stdout(io.StringIO()) as said:
      ...     code = report(as_json=False)
      >>> said.getvalue().splitlines()[0]
      'versions'
    """
    found = examine()
    print(json.dumps({"ok": found.ok, **asdict(found)}, indent=1) if as_json else found)
    sys.stdout.flush()
    return 0 if found.ok else 1
