"""The process that compiles: a program, its shardings and a topology in, figures out.

Called as ``python -m shardinit.verify.audit.worker FOLDER``, with ``program.init`` (an
``InitProgram``) and ``request.json`` there; it leaves ``result.json``. It imports no
model code and unpickles nothing: the functions are in the program. It has the
environment that ``topology.environment`` makes, which must be there before JAX starts.
"""

from __future__ import annotations

import json
import math
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from shardinit.core.plan.leaves import PlanProgram
from shardinit.core.plan.plan import Plan
from shardinit.core.plan.planning import plan
from shardinit.core.program.program import load_program
from shardinit.core.run.lower import lower
from shardinit.errors import ShardinitError
from shardinit.verify.audit import hlo
from shardinit.verify.audit import topology as topologies
from shardinit.verify.audit.report import FLOOR_BYTES


def main() -> None:
    """Does what the request says; an error becomes the result."""
    folder = Path(sys.argv[1])
    try:
        result = compile_all(folder)
    except ShardinitError as error:
        parts = (error.where, error.got, error.expected, error.remedy)
        result = {"error": parts}
    except jax.errors.JaxRuntimeError as error:
        result = {"error": ("the compiler", " ".join(str(error).split())[:2000])}
    (folder / "result.json").write_text(json.dumps(result))


def compile_all(folder: Path) -> dict[str, Any]:
    """Compiles each distinct program and measures what came out."""
    request = json.loads((folder / "request.json").read_text())
    wanted = topologies.topology(request["topology"])
    devices = np.asarray(topologies.devices(wanted))
    mesh = Mesh(devices.reshape(list(request["mesh"].values())), tuple(request["mesh"]))
    made = replan(folder / "program.init", request, mesh)
    gspmd = made.whole_mode == "gspmd"
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        pending = []
        for program in made.programs:
            shardings = [s for s in program.shardings if s is not None]
            # Lowered in this thread, one after the other: JAX traces under the
            # interpreter's lock; the compiler runs without it.
            lowered = lower([program], shardings, gspmd=gspmd)
            pending.append(pool.submit(lowered.compile))
        rows = [
            measure(program, job.result())
            for program, job in zip(made.programs, pending, strict=True)
        ]
    return {
        "versions": _versions(wanted.platform),
        "fingerprint": made.fingerprint,
        "numbers": {leaf.path: leaf.program for leaf in made.leaves if leaf.selected},
        "rows": rows,
    }


def replan(path: Path, request: dict[str, Any], mesh: Mesh) -> Plan:
    """The plan that was sent, on devices."""
    program = load_program(path)
    cut = program.as_cut()

    def sharding(path: str) -> NamedSharding:
        entries = [tuple(e) if e is not None else None for e in request["specs"][path]]
        kind = request["kinds"].get(path)
        return NamedSharding(mesh, PartitionSpec(*entries), memory_kind=kind)

    places = jax.tree.unflatten(cut.tree, [sharding(leaf.path) for leaf in cut.leaves])
    chosen = frozenset(request["selected"])
    return plan(
        program,
        mesh=mesh,
        out_shardings=places,
        select=chosen.__contains__,
        whole=request["whole"],
    )


def measure(program: PlanProgram, compiled: Any) -> dict[str, Any]:
    """The figures of one executable."""
    memory = compiled.memory_analysis()
    module = hlo.parse(compiled.as_text())
    smallest = min(
        (
            math.prod(shape)
            for shape, sharding in zip(program.shapes, program.shardings, strict=True)
            if sharding is not None and sharding.shard_shape(shape) != shape
        ),
        default=0,
    )
    return {
        "output_bytes": memory.output_size_in_bytes + memory.host_output_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "code_bytes": memory.generated_code_size_in_bytes,
        "padded": [shape.padded_bytes for shape in module.results],
        "results": [str(shape.dims) for shape in module.results],
        "collectives": module.collectives(),
        "full_size": full_size(module, smallest),
        "bytes_moved": module.bytes_moved(),
        "blockwise": bool(module.loops()) and not program.whole,
    }


def full_size(module: hlo.Module, elements: int) -> list[str]:
    """Materialised values of at least so many elements, if that is large."""
    if not elements:
        return []
    found = {
        f"{shape} by {line.opcode}": None
        for line, _, _ in module.materialised()
        for shape in line.shapes
        if shape.size >= elements and shape.bytes >= FLOOR_BYTES
    }
    return list(found)


def _versions(platform: str) -> str:
    compiler = {"tpu": "libtpu", "gpu": "jax-cuda12-plugin", "cpu": "jaxlib"}[platform]
    return f"JAX {jax.__version__}, {compiler} {metadata.version(compiler)}"


if __name__ == "__main__":
    main()
