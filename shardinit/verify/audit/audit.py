"""Audit: a plan, compiled by the real compiler of chips that are not there.

What a launch will do to 4,096 chips is decided by a compiler that runs on any laptop.
So each distinct program of the plan is compiled at its sharding for the topology, and
what came out is held against the promise that a device makes its own shard and nothing
else (``report`` says what counts as a fault).

It happens in another process. The compilers want an environment that JAX reads once,
when it starts, and the JAX of the caller may be training. The plan crosses as an init
program and its partition specs: functions as StableHLO with a digest, and JSON.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shardinit.core.ir.jaxpr import setting
from shardinit.core.plan.entries import mesh_axes, other_memory
from shardinit.core.plan.leaves import PlanLeaf, PlanProgram
from shardinit.core.plan.plan import Plan, checked
from shardinit.core.plan.tables import spec_text
from shardinit.core.program.program import export_plan
from shardinit.errors import ArgumentError, AuditError, ShardingError
from shardinit.verify.audit import topology as topologies
from shardinit.verify.audit.report import AuditReport, AuditRow, faults_of, first_of

REPLICATED_BYTES = 1 << 20
_LIMIT_SECONDS = 3600.0


def audit(
    plan: Plan, topology: str, *, replicated_bytes: int = REPLICATED_BYTES
) -> AuditReport:
    """Compiles a plan for devices that are not there and says what each will hold.

    Args:
      plan: from ``shardinit.plan``, on a mesh (an ``AbstractMesh`` will do) of as many
        devices as the topology has.
      topology: such as ``"tpu:v5p:16x16x16"``, ``"gpu:h100:8x8"`` (hosts x devices) or
        ``"cpu:8"``.
      replicated_bytes: a leaf larger than this that lies whole on every device is a
        fault: a forgotten sharding.

    Raises:
      TopologyError: no such topology, or no compiler for it is installed.
      ShardingError: the plan's mesh has another number of devices.
      AuditError: the compiler failed.

    Example:
      >>> import jax, shardinit
      >>> mesh = jax.sharding.AbstractMesh((2,), ("data",))
      >>> init = lambda key: jax.random.normal(key, (64, 32))
      >>> plan = shardinit.plan(init, mesh=mesh, rules=shardinit.fsdp(min_bytes=0))
      >>> report = shardinit.audit(plan, "cpu:2")
      >>> report.ok, report.bytes_per_device
      (True, 4096)
    """
    wanted = topologies.topology(topology)
    ArgumentError.check_bytes("replicated_bytes", replicated_bytes)
    _check_mesh(checked(plan, "audit"), wanted)
    topologies.check_installed(wanted)
    with tempfile.TemporaryDirectory(prefix="shardinit-audit-") as name:
        folder = Path(name)
        export_plan(plan).save(folder / "program.init")
        (folder / "request.json").write_text(json.dumps(_request(plan, wanted)))
        result = _run(folder, wanted)
    return _report(plan, wanted, result, replicated_bytes)


def _check_mesh(plan: Plan, wanted: topologies.Topology) -> None:
    if plan.mesh is None or plan.mesh.size != wanted.devices:
        got = "none" if plan.mesh is None else f"{dict(plan.mesh.shape)}"
        raise ShardingError(
            "mesh of the plan",
            got,
            f"{wanted.devices:,} devices, as {wanted.name} has",
            f"Plan on AbstractMesh(({wanted.devices},), ('device',)) or the like",
        )
    for leaf in plan.leaves:
        if leaf.sharding is None or leaf.sharding.mesh.shape != plan.mesh.shape:
            raise ShardingError(
                f"leaf {leaf.path!r}",
                f"{leaf.sharding}",
                f"a sharding on the plan's mesh {dict(plan.mesh.shape)}",
            )


def _request(plan: Plan, wanted: topologies.Topology) -> dict[str, Any]:
    """What the other process must know beside the program: plain data."""
    return {
        "topology": wanted.name,
        "mesh": plan.mesh_shape,
        "specs": {leaf.path: _entries(leaf) for leaf in plan.leaves},
        "kinds": {x.path: x.sharding.memory_kind for x in plan.leaves if x.sharding},
        "selected": [leaf.path for leaf in plan.leaves if leaf.selected],
        "whole": plan.whole_mode,
    }


def _entries(leaf: PlanLeaf) -> list[list[str] | None]:
    spec = () if leaf.sharding is None else leaf.sharding.spec
    return [list(mesh_axes(entry)) or None for entry in spec]


def _run(folder: Path, wanted: topologies.Topology) -> dict[str, Any]:
    """The other process; what it found."""
    env = topologies.environment(wanted, os.environ)
    env["JAX_ENABLE_X64"] = str(bool(setting("jax_enable_x64"))).lower()
    # ``-P`` below leaves the working directory out of the path, where a file named as a
    # module of ours would be run in its place.
    env["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    command = [sys.executable, "-P", "-m", "shardinit.verify.audit.worker", str(folder)]
    done = subprocess.run(
        command, env=env, capture_output=True, timeout=_LIMIT_SECONDS, check=False
    )
    try:
        result = json.loads((folder / "result.json").read_text())
    except FileNotFoundError:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        got = f"exit status {done.returncode}: {''.join(said[-1:])}"
        raise AuditError(f"audit for {wanted.name}", got) from None
    if "error" in result:
        raise AuditError(*result["error"])
    return result


def _report(
    plan: Plan, wanted: topologies.Topology, result: dict[str, Any], limit: int
) -> AuditReport:
    _check_plan(plan, wanted, result)
    chosen = [leaf for leaf in plan.leaves if leaf.selected]
    rows = tuple(
        _row(plan, number, figures, wanted.chip.bandwidth)
        for number, figures in enumerate(result["rows"])
    )
    hosted = [leaf for leaf in chosen if leaf.is_hosted]
    padded = _padded(rows, hosted)
    largest = max((row.temporary_bytes for row in rows), default=0)
    moved = sum(row.bytes_moved * row.runs for row in rows)
    peak = padded + largest
    faults = [
        *(f"{first_of(row.paths)} {fault}" for row in rows for fault in row.faults),
        *_forgotten(chosen, wanted.devices, limit),
        *_beyond(peak, wanted.chip.memory_bytes),
    ]
    return AuditReport(
        name=plan.name,
        topology=wanted.name,
        mesh=plan.mesh_shape,
        versions=result["versions"],
        rows=rows,
        leaves=len(chosen),
        host_leaves=len(hosted),
        bytes_per_device=plan.bytes_per_device,
        host_bytes_per_device=plan.host_bytes_per_device,
        padded_bytes_per_device=padded,
        largest_temporary=largest,
        peak_bytes=peak,
        memory_bytes=wanted.chip.memory_bytes,
        bytes_moved=moved,
        seconds=_seconds(moved, wanted.chip.bandwidth),
        whole=tuple((leaf.path, leaf.whole) for leaf in plan.whole_leaves),
        faults=tuple(faults),
    )


def _check_plan(
    plan: Plan, wanted: topologies.Topology, result: dict[str, Any]
) -> None:
    """Finds out whether the other process compiled the plan that it was sent."""
    numbers = {leaf.path: leaf.program for leaf in plan.leaves if leaf.selected}
    if result["fingerprint"] != plan.fingerprint or result["numbers"] != numbers:
        raise AuditError(wanted.name, "another plan came back than was sent")


def _row(plan: Plan, number: int, figures: dict[str, Any], bandwidth: int) -> AuditRow:
    leaves = [x for x in plan.leaves if x.selected and x.program == number]
    program = plan.programs[number]
    first = leaves[: len(program.shapes)]
    row = AuditRow(
        program=number,
        paths=tuple(leaf.path for leaf in leaves),
        shapes=program.shapes,
        dtypes=tuple(str(leaf.dtype) for leaf in first),
        specs=tuple(spec_text(s) for s in program.shardings if s),
        shard_bytes=sum(leaf.bytes_per_device for leaf in first),
        padded_bytes=sum(figures["padded"]),
        host_bytes=_host_bytes(figures["padded"], program),
        output_bytes=figures["output_bytes"],
        temporary_bytes=figures["temporary_bytes"],
        code_bytes=figures["code_bytes"],
        collectives=tuple(figures["collectives"]),
        full_size=tuple(figures["full_size"]),
        bytes_moved=figures["bytes_moved"],
        seconds=_seconds(figures["bytes_moved"], bandwidth),
        whole=program.whole,
        blockwise=figures["blockwise"],
        faults=(),
    )
    expected = [
        str(tuple(s.shard_shape(shape)))
        for s, shape in zip(program.shardings, program.shapes, strict=True)
        if s
    ]
    faults = faults_of(row, expected, figures["results"])
    return dataclasses.replace(row, faults=tuple(faults))


def _padded(rows: Sequence[AuditRow], hosted: Sequence[PlanLeaf]) -> int:
    """Bytes of all shards in a device's own memory as the compiler lays them out."""
    put = sum(leaf.bytes_per_device for leaf in hosted if not leaf.memory_kind)
    return put + sum((row.padded_bytes - row.host_bytes) * row.runs for row in rows)


def _host_bytes(padded: Sequence[int], program: PlanProgram) -> int:
    """Bytes of those results of a program that lie in another memory."""
    places = zip(padded, program.shardings, strict=True)
    return sum(size for size, place in places if other_memory(place))


def _seconds(moved: int, bandwidth: int) -> float:
    """Seconds that so many bytes take to and from memory; 0 where it is not known."""
    return moved / bandwidth if bandwidth else 0.0


def _beyond(peak: int, memory: int) -> list[str]:
    """The fault of a plan that needs more memory than the chip has."""
    if not memory or peak <= memory:
        return []
    return [f"{peak:,} bytes do not fit in {memory:,} of memory"]


def _forgotten(leaves: Sequence[PlanLeaf], devices: int, limit: int) -> list[str]:
    """Leaves that lie whole on every device and are too large for that."""
    groups: dict[Any, list[str]] = {}
    for leaf in leaves:
        whole = leaf.sharding is None or leaf.sharding.is_fully_replicated
        if whole and devices > 1 and leaf.bytes_per_device > limit:
            kind = (leaf.program, leaf.shape, leaf.bytes_per_device)
            groups.setdefault(kind, []).append(leaf.path)
    return [
        f"{first_of(paths)} lies whole on each of {devices:,} devices: {size:,} bytes, "
        f"more than {limit:,}"
        for (_, _, size), paths in groups.items()
    ]
