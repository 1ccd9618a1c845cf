"""Deviceless: what the compilers of 64 chips that are not there take for a model.

A launch waits for the accelerator's compiler, which is slower than that of the CPU and
needs no accelerator to be measured. From the init function to executables for every
leaf, of an unrolled decoder on 64 TPU v5p and on 64 H100; nothing runs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from shardinit.bench import subjects
from shardinit.bench.case import Bench, Figures, Job, Row, Target, register, timed
from shardinit.errors import TopologyError
from shardinit.verify.audit import topology as topologies

if TYPE_CHECKING:
    from jax.sharding import Mesh

TOPOLOGIES = {"tpu": "tpu:v5p:4x4x4", "gpu": "gpu:h100:8x8"}


def _mesh(topology: str) -> Mesh:
    """The devices of a topology; JAX must not have started before."""
    wanted = topologies.topology(topology)
    os.environ.update(topologies.environment(wanted, os.environ))
    import jax
    import numpy as np

    devices = np.asarray(topologies.devices(wanted)).reshape(16, 4)
    return jax.sharding.Mesh(devices, ("data", "model"))


def ours(topology: str, layers: int) -> Figures:
    """``shardinit.plan`` and ``compile_plan``."""
    from shardinit.core.init_fn import InitFn
    from shardinit.core.plan.planning import plan as make_plan
    from shardinit.core.run.compile import compile_plan

    mesh, rules = _mesh(topology), subjects.rules()
    init = subjects.narrow(layers)
    fn = init.fn
    # A function that JAX has not traced yet: it keeps traces by function.
    new = InitFn(lambda key: fn(key), axes=init.axes)
    seconds, compiled = timed(
        lambda: compile_plan(make_plan(new, mesh=mesh, rules=rules))
    )
    return {"seconds": seconds, "programs": len(compiled.executables)}


def jit(topology: str, layers: int) -> Figures:
    """``jax.jit(init, out_shardings)``, lowered and compiled."""
    mesh = _mesh(topology)
    import jax

    subject = subjects.subject(subjects.narrow(layers), mesh)
    own = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=own)
    jitted = jax.jit(subject.fn, out_shardings=subject.shardings)
    return {"seconds": timed(lambda: jitted.lower(key).compile())[0]}


def rows(bench: Bench) -> Iterator[Row]:
    """One row for each platform whose compiler is installed."""
    layers = 2 if bench.options.quick else 64
    for platform, name in TOPOLOGIES.items():
        try:
            topologies.check_installed(topologies.topology(name))
        except TopologyError as error:
            print(f"not measured: {error}", file=sys.stderr)
            continue
        sizes = {"topology": name, "layers": layers}
        jobs = Job("shardinit", sizes), Job("jit", sizes, 1)
        mine, theirs = bench.measure(CASE, *jobs)
        note = f"{mine[0]['programs']:.0f} programs"
        if bench.options.repeats > 1:
            note += "; jit ran once"
        title = f"compile for {name}, {layers} layers"
        yield CASE.compare(
            bench, title, mine, theirs, "jit", target=platform, note=note
        )


CASE = register(
    name="deviceless",
    measures="compiling a model for 64 TPUs and 64 GPUs that are not there",
    baseline="jax.jit(init, out_shardings) of the same function",
    sides={"shardinit": ours, "jit": jit},
    rows=rows,
    targets={"tpu": Target(25, 50), "gpu": Target(60, 150)},
)
