"""Large: an 8B decoder with Adam's state, from nothing to the devices' memory.

What a job on one card waits for and what it has to spare while it does: bfloat16
parameters and both moments, 48 GB, made where they stay. Peak memory is the devices'
own account; on simulated devices, which keep none, it is the process's, and the model
is the 1.1B one.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from shardinit.bench import subjects
from shardinit.bench.case import (
    Bench,
    Figures,
    Job,
    OutOfMemory,
    Row,
    Target,
    median,
    register,
    sample,
    timed,
)

_SIZES = {"cpu": ("tinyllama-1.1b", 22, 6_600_000_000)}
_CARD = ("llama-3.1-8b", 32, 0)  # what it takes lies in the devices' memory


def state(model: str, layers: int, devices: int) -> Figures:
    """``shardinit.init`` of the parameters and ``optax.adam``'s state, twice."""
    import jax
    import optax

    from shardinit.core.plan.planning import plan as make_plan
    from shardinit.core.run.compile import compile_plan
    from shardinit.frontends.optax import with_optimizer

    changed = {"num_hidden_layers": layers, "param_dtype": "bfloat16"}
    fn = with_optimizer(subjects.example(model, **changed), optax.adam(1e-3))
    mesh = subjects.mesh(len(jax.devices()))
    jax.block_until_ready(jax.device_put(1.0))  # the backend is up
    planning, plan = timed(make_plan, fn, mesh=mesh, rules=subjects.rules())
    compiling, compiled = timed(compile_plan, plan)
    first, made = timed(compiled, 1)
    peak = subjects.peak_bytes()
    del made
    return {
        "seconds": planning + compiling + first,
        "warm_seconds": timed(compiled, 2)[0],
        "peak_bytes": peak,
        "total_bytes": plan.total_bytes,
        "programs": len(plan.programs),
    }


def rows(bench: Bench) -> Iterator[Row]:
    """The time, and the peak over the bytes of the state."""
    options = bench.options
    model, layers, needed = _SIZES.get(options.platform, _CARD)
    if options.quick:
        layers, needed = 1, 0
    sizes = {"model": model, "layers": layers, "devices": options.devices}
    try:
        (runs,) = bench.measure(CASE, Job("shardinit", sizes, needs_bytes=needed))
    except OutOfMemory as error:
        print(f"not measured: {error}", file=sys.stderr)
        return
    size, seconds = median(runs, "total_bytes", 1e-9), sample(runs, "seconds")
    warm, programs = median(runs, "warm_seconds"), runs[0]["programs"]
    name = f"{model} of {layers} layers, with Adam"
    note = f"{size:.3g} GB, {programs:.0f} programs; again in {warm:.2f} s"
    yield CASE.row(bench, name, seconds.median, seconds, unit="s", note=note)
    held = sample(runs, "peak_bytes", 1e-9)
    peak = f"{name}: peak memory over bytes"
    value = held.median / size
    yield CASE.row(bench, peak, value, held, side_unit="GB", target="peak")


CASE = register(
    name="large",
    measures="an 8B decoder with Adam's state onto accelerators; 1.1B on CPU",
    baseline="the bytes of the state",
    sides={"shardinit": state},
    rows=rows,
    targets={"peak": Target(1.35, 1.1, higher=False)},
)
