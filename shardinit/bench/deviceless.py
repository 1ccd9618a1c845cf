"""Deviceless: what the compilers of 64 chips that are not there take for a model.

A launch waits for the accelerator's compiler, which is slower than that of the CPU and
needs no accelerator to be measured. From the init function to executables for every
leaf, of an unrolled decoder on 64 TPU v5p and on 64 H100; nothing runs.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from typing import Any

from shardinit.bench.case import (
    Bench,
    Case,
    Figures,
    Job,
    Row,
    Target,
    register,
    sample,
)

TOPOLOGIES = {"tpu": "tpu:v5p:4x4x4", "gpu": "gpu:h100:8x8"}
_MESH = (16, 4)


def _prepared(topology: str, layers: int) -> tuple[Any, Any]:
    """The model and its shardings on the devices of the topology."""
    from shardinit.verify.audit import topology as topologies

    wanted = topologies.topology(topology)
    os.environ.update(topologies.environment(wanted, os.environ))
    import jax
    import numpy as np

    from shardinit.bench import subjects

    devices = np.asarray(topologies.devices(wanted)).reshape(_MESH)
    mesh = jax.sharding.Mesh(devices, ("data", "model"))
    return subjects.narrow(layers), mesh


def ours(topology: str, layers: int) -> Figures:
    """``shardinit.plan`` and ``compile_plan``."""
    from shardinit.bench import subjects
    from shardinit.core.init_fn import InitFn
    from shardinit.core.plan.plan import plan as make_plan
    from shardinit.core.run.compile import compile_plan

    init, mesh = _prepared(topology, layers)
    fn = init.fn
    new = InitFn(lambda key: fn(key), axes=init.axes)
    begin = time.perf_counter()
    plan = make_plan(new, mesh=mesh, rules=subjects.RULES)
    compiled = compile_plan(plan)
    seconds = time.perf_counter() - begin
    return {"seconds": seconds, "programs": len(compiled.executables)}


def jit(topology: str, layers: int) -> Figures:
    """``jax.jit(init, out_shardings)``, lowered and compiled."""
    import jax

    from shardinit.bench import subjects
    from shardinit.core.plan.plan import plan as make_plan

    init, mesh = _prepared(topology, layers)
    fn = init.fn
    plan = make_plan(init, mesh=mesh, rules=subjects.RULES)
    places = jax.tree.unflatten(plan.cut.tree, [x.sharding for x in plan.leaves])
    own = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=own)
    begin = time.perf_counter()
    jax.jit(lambda key: fn(key), out_shardings=places).lower(key).compile()
    return {"seconds": time.perf_counter() - begin}


def rows(bench: Bench) -> Iterator[Row]:
    """One row for each platform whose compiler is installed."""
    from shardinit.errors import TopologyError
    from shardinit.verify.audit import topology as topologies

    options = bench.options
    layers = 2 if options.quick else 64
    for platform, name in TOPOLOGIES.items():
        try:
            topologies.check_installed(topologies.topology(name))
        except TopologyError as error:
            print(f"not measured: {error}", file=sys.stderr)
            continue
        parameters = {"topology": name, "layers": layers}
        mine, theirs = bench.measure(
            CASE,
            Job("shardinit", parameters, options.repeats),
            Job("jit", parameters, 1),
        )
        found, baseline = sample(mine, "seconds"), sample(theirs, "seconds")
        yield Row(
            CASE.name,
            f"compile for {name}, {layers} layers",
            baseline.median / found.median,
            "x",
            found,
            baseline,
            "jit",
            target=None if options.quick else CASE.targets[platform],
            note=f"{mine[0]['programs']:.0f} programs"
            + ("; jit ran once" if options.repeats > 1 else ""),
        )


CASE = register(
    Case(
        name="deviceless",
        measures="compiling a model for 64 TPUs and 64 GPUs that are not there",
        baseline="jax.jit(init, out_shardings) of the same function",
        sides={"shardinit": ours, "jit": jit},
        rows=rows,
        targets={"tpu": Target(25, 50), "gpu": Target(60, 150)},
    )
)
