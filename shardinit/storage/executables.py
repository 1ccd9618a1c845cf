"""Executables: a plan's compiled programs in one file, for a machine just like this.

Compiling is most of a start. A second process of the same job, on the same kind of
machine, compiles the same few programs to the same machine code; with this file it
loads them instead. The entries are those of JAX's persistent compilation cache, which
names each by a hash of the lowered program, the compiler's options, the versions and
the devices, so that code is only found by the program that it belongs to. Nothing is
unpickled.

An executable is machine code: whoever wrote it runs it in this process. A digest says
that a file is the one that was sent, never that it is harmless. Hence the digest is
asked for, from whoever made the file, and checked before anything is parsed; and the
entries lie in a folder of their own only while the plan compiles, so that no other
program and no later process meets them.

The file: one line of JSON, what it was made on and for and each entry's name and size;
then the entries, one after the other.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from jax import monitoring
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh

from shardinit.core import platform as machine
from shardinit.core.ir.jaxpr import setting
from shardinit.core.plan.plan import Plan, checked
from shardinit.core.program.exported import ExportedProgram
from shardinit.core.run.compile import CompiledPlan, compile_plan, on_devices
from shardinit.errors import ArgumentError, ExecutablesError, ExecutablesWarning
from shardinit.files import write_file

FORMAT = 1
MAX_BYTES = 1 << 30
_MAGIC = "shardinit executables"
_HIT = "/jax/compilation_cache/cache_hits"
_ENTRY = re.compile(r"jit_(leaf|whole)_program-[0-9a-f]{64}-cache")

# What must be the same on both sides, and what to do where it is not.
_REMEDY = "Make the file anew here, or start without it"
_FACTS = {
    "jax": "Install that JAX, or make the file anew with this one",
    "jaxlib": "Install that jaxlib, or make the file anew with this one",
    "platform": _REMEDY,
    "platform version": _REMEDY,
    "device kind": _REMEDY,
    "processor": _REMEDY,
    "XLA flags": "Set the same XLA_FLAGS, or make the file anew with these",
    "mesh": "Pass a mesh of that shape, or make the file anew for this one",
    "fingerprint": "The file is for another model, or another type of key",
    "planned from": "Plan from the same: a program and its function lower differently",
    "shardings": "Plan with the same rules and selection, or make the file anew",
}

# While the private folder is JAX's cache. XLA's own caches, which come with it since
# https://github.com/jax-ml/jax/pull/22899, would put the folder's name into the
# entries' names.
_SETTINGS = {
    # Of the others: JAX stores nothing that compiles in under a second, as leaf
    # programs do; a size of 0 lets the file system's own least size override it; and
    # with a largest size there would be a lock file and a time stamp beside each entry.
    # (https://docs.jax.dev/en/latest/persistent_compilation_cache.html)
    "jax_enable_compilation_cache": True,
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
    "jax_persistent_cache_enable_xla_caches": "none",
    "jax_compilation_cache_max_size": -1,
    "jax_compilation_cache_check_contents": False,
    "jax_compilation_cache_include_metadata_in_key": False,
}
_ONE_AT_A_TIME = threading.Lock()


def save_executables(
    plan: Plan, path: str | os.PathLike[str], *, mesh: Mesh | None = None
) -> str:
    """Compiles a plan and writes its executables: a whole file, or none.

    Args:
      plan: from ``shardinit.plan``, of what the other process will plan too.
      path: the file. Where executables of the same plan for this machine are there
        already, they stay.
      mesh: as for ``compile_plan``.

    Returns:
      The SHA-256 of the file, in hex. Whoever is to load it needs that, from you.

    Raises:
      ExecutablesError: something else is there, this is a job of several processes, or
        the platform's executables cannot be stored.
      ShardingError: as ``compile_plan``.

    Example:
      >>> import jax, shardinit, tempfile
      >>> plan = shardinit.plan(lambda key: jax.random.normal(key, (8, 32)))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     digest = shardinit.save_executables(plan, f"{folder}/code")
      >>> len(digest)
      64
    """
    checked(plan, "save_executables")
    ArgumentError.check_path("save_executables", path)
    target = Path(os.path.abspath(path))
    facts = _facts(plan, mesh)
    if os.path.lexists(target):
        return _there(target, facts)
    with _private_cache(raise_errors=True) as folder:
        compile_plan(plan, mesh=mesh)
        files = sorted(p for p in folder.iterdir() if _ENTRY.fullmatch(p.name))
        entries = {file.name: file.read_bytes() for file in files}
    if not entries:
        raise ExecutablesError(
            "executables", f"JAX stores none on {facts['platform']!r} for this plan"
        )
    sizes = [[name, len(content)] for name, content in entries.items()]
    head = json.dumps({_MAGIC: FORMAT, **facts, "entries": sizes}) + "\n"
    data = b"".join([head.encode(), *entries.values()])
    try:
        write_file(target, data, replace=False)
    except FileExistsError as error:
        raise ExecutablesError.taken("executables", target) from error
    return hashlib.sha256(data).hexdigest()


def load_executables(
    path: str | os.PathLike[str], plan: Plan, *, sha256: str, mesh: Mesh | None = None
) -> CompiledPlan:
    """Compiles a plan with the executables of a file instead of the compiler.

    Load only what comes from a party that you would let install software: an
    executable can do whatever this process can.

    Args:
      path: a file that ``save_executables`` wrote.
      plan: the same plan as there, for a mesh of the same shape.
      sha256: the file's digest in hex, as ``save_executables`` returned it and its
        maker told you; not one that came along with the file.
      mesh: as for ``compile_plan``.

    Returns:
      What ``compile_plan`` returns. Programs that the file lacks are compiled, and an
      ``ExecutablesWarning`` says how many.

    Raises:
      ExecutablesError: the file has another digest or cannot be read, was made by
        other versions, on another kind of machine, or for another plan or mesh.
      ShardingError: as ``compile_plan``.
      OSError: the file cannot be read.

    Example:
      >>> import jax, shardinit, tempfile
      >>> plan = shardinit.plan(lambda key: jax.random.normal(key, (8, 32)))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     digest = shardinit.save_executables(plan, f"{folder}/code")
      ...     loaded = shardinit.load_executables(f"{folder}/code", plan, sha256=digest)
      >>> loaded(0).shape
      (8, 32)
    """
    ArgumentError.check_path("load_executables", path)
    if not isinstance(sha256, str):
        raise ArgumentError(
            "sha256", repr(sha256), "the digest in hex that save_executables returned"
        )
    where = f"executables {os.fspath(path)!r}"
    facts = _facts(checked(plan, "load_executables"), mesh)
    manifest, entries = _parse(where, _read(where, path, sha256))
    for name, remedy in _FACTS.items():
        if manifest.get(name) != facts[name]:
            got, wanted = _differ(manifest.get(name), facts[name])
            raise ExecutablesError(
                where, f"made for the {name} {got}", f"what is here, {wanted}", remedy
            )
    events: list[str] = []

    def listen(event: str, **_: Any) -> None:
        events.append(event)

    with _private_cache(raise_errors=False) as folder:
        for name, content in entries.items():
            (folder / name).write_bytes(content)
        monitoring.register_event_listener(listen)
        try:
            compiled = compile_plan(plan, mesh=mesh)
        finally:
            monitoring.unregister_event_listener(listen)
    lacking = len(compiled.executables) - events.count(_HIT)
    if lacking > 0:
        warnings.warn(
            f"{where}: {lacking} of {len(compiled.executables)} were not in it and "
            "had to be compiled. The mesh's devices may stand in another order, or a "
            "setting of JAX's compiler differ",
            ExecutablesWarning,
            stacklevel=2,
        )
    return compiled


def _there(target: Path, facts: dict[str, Any]) -> str:
    """The SHA-256 of a file that is there, if it is for the same.

    Raises:
      ExecutablesError: it is something else.
    """
    try:
        data = target.read_bytes()
        manifest, _ = _parse(f"executables {str(target)!r}", data)
    except (OSError, ExecutablesError) as error:
        raise ExecutablesError.taken("executables", target) from error
    for name in _FACTS:
        if manifest.get(name) != facts[name]:
            got, wanted = _differ(manifest.get(name), facts[name])
            why = f"made for the {name} {got}, not {wanted}"
            raise ExecutablesError.taken("executables", target, why)
    return hashlib.sha256(data).hexdigest()


def _facts(plan: Plan, mesh: Mesh | None) -> dict[str, Any]:
    """What the executables of a plan depend on, as JSON has it."""
    if jax.process_count() > 1:
        raise ExecutablesError(
            "executables",
            f"a job of {jax.process_count()} processes",
            "one process",
            "JAX stores the executables of process 0 only: start from the program",
        )
    shardings = on_devices(plan, mesh)
    if not plan.programs:
        raise ExecutablesError("executables", f"{plan.name} has no program to compile")
    placed_on: Any = shardings[0].mesh
    device = placed_on.devices.flat[0]
    exported = isinstance(plan.programs[0].program, ExportedProgram)
    bound = mesh is not None
    placed = [
        f"{sharding.spec} {sharding.memory_kind} {bound or leaf.sharding is not None}"
        if leaf.selected
        else None
        for leaf, sharding in zip(plan.leaves, shardings, strict=True)
    ]
    described = repr((plan.whole_mode, placed)).encode()
    return {
        "jax": jax.__version__,
        "jaxlib": metadata.version("jaxlib"),
        "platform": device.platform,
        "platform version": device.client.platform_version,
        "device kind": device.device_kind,
        "processor": list(machine.processor(device.platform)),
        "XLA flags": list(machine.xla_flags()),
        "mesh": ",".join(f"{axis}={size}" for axis, size in placed_on.shape.items()),
        "fingerprint": plan.fingerprint,
        "planned from": "a program" if exported else "a function",
        "shardings": hashlib.sha256(described).hexdigest(),
    }


def _differ(got: Any, expected: Any) -> tuple[str, str]:
    """Of two lists what only one has; everything else as it is."""
    if not (isinstance(got, list) and isinstance(expected, list)):
        return repr(got), repr(expected)
    more = (
        [x for x in got if x not in expected],
        [x for x in expected if x not in got],
    )
    first, second = (f"with {' '.join(map(str, x)) or 'nothing more'}" for x in more)
    return first, second


def _read(where: str, path: str | os.PathLike[str], sha256: str) -> bytes:
    """The file, if it is the one that was meant."""
    if not re.fullmatch("[0-9a-fA-F]{64}", sha256):
        raise ExecutablesError(
            "sha256", repr(sha256), "64 hex digits, as save_executables returned them"
        )
    with open(path, "rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ExecutablesError(where, f"more than {MAX_BYTES:,} bytes", "fewer")
    found = hashlib.sha256(data).hexdigest()
    if found != sha256.lower():
        raise ExecutablesError(
            where,
            f"its SHA-256 is {found}",
            sha256.lower(),
            "It is damaged, cut short or not the file that was meant: do not use it",
        )
    return data


def _parse(where: str, data: bytes) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The manifest, and the entries by name."""
    head, _, body = data.partition(b"\n")
    try:
        manifest = json.loads(head)
        if manifest[_MAGIC] != FORMAT:
            raise ValueError(f"format {manifest[_MAGIC]!r}, expected {FORMAT}")
        entries: dict[str, bytes] = {}
        at = 0
        for name, size in manifest["entries"]:
            if not _ENTRY.fullmatch(name) or name in entries:
                raise ValueError(f"an entry of the name {name!r}")
            if type(size) is not int or not 0 < size <= len(body) - at:
                raise ValueError(f"an entry of {size!r} bytes")
            entries[name] = body[at : at + size]
            at += size
        if at != len(body):
            raise ValueError(f"{len(body) - at} bytes that no entry announces")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ExecutablesError(
            where,
            f"it cannot be read ({type(error).__name__}: {error})"[:300],
            "a file that save_executables of this release wrote",
        ) from error
    return manifest, entries


@contextmanager
def _private_cache(*, raise_errors: bool) -> Iterator[Path]:
    """Makes a new folder JAX's compilation cache for a while, and nobody else's."""
    with (
        _ONE_AT_A_TIME,
        tempfile.TemporaryDirectory(prefix="shardinit-") as folder,
    ):
        wanted = {
            **_SETTINGS,
            "jax_compilation_cache_dir": folder,
            "jax_raise_persistent_cache_errors": raise_errors,
        }
        before = {name: setting(name) for name in wanted}
        try:
            for name, value in wanted.items():
                jax.config.update(name, value)
            compilation_cache.reset_cache()  # JAX looks at the folder's name but once
            yield Path(folder)
        finally:
            for name, value in before.items():
                jax.config.update(name, value)
            compilation_cache.reset_cache()
