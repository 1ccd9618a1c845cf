"""Cold start: from an init function that JAX has never seen to the last byte.

What a job waits for before its first step. Plain ``jax.jit`` compiles one program for
the whole model, so that its time grows with depth, faster than linearly. The model is
narrow, so that compiling and dispatching are what is measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from shardinit.bench import subjects
from shardinit.bench.case import (
    Bench,
    Figures,
    Job,
    Row,
    Target,
    median,
    register,
    timed,
)

_SLOW_LAYERS = 64  # from here on plain jit takes minutes: one run of it


def _time(
    layers: int, devices: int, init: Callable[[subjects.Subject, Any], Any]
) -> Figures:
    import jax

    subject = subjects.subject(subjects.narrow(layers), subjects.mesh(devices))
    key = jax.random.key(1)
    jax.block_until_ready(jax.device_put(1.0))  # the backend is up
    seconds, _ = timed(init, subject, key)
    return {
        "seconds": seconds,
        "leaves": subject.leaves,
        "total_bytes": subject.total_bytes,
    }


def ours(layers: int, devices: int) -> Figures:
    """``shardinit.init``: cut, plan, compile, run."""
    from shardinit.core.run.init import init as init_sharded

    def init(subject: subjects.Subject, key: Any) -> Any:
        return init_sharded(subject.fn, key, out_shardings=subject.shardings)

    return _time(layers, devices, init)


def jit(layers: int, devices: int) -> Figures:
    """``jax.jit(init, out_shardings)``: trace, compile, run."""
    import jax

    def init(subject: subjects.Subject, key: Any) -> Any:
        return jax.jit(subject.fn, out_shardings=subject.shardings)(key)

    return _time(layers, devices, init)


def floor(layers: int, devices: int) -> Figures:
    """What a cold start cannot do without: tracing the function, and one warm run."""
    import jax

    from shardinit.core.plan.planning import plan
    from shardinit.core.run.compile import compile_plan

    subject = subjects.subject(subjects.narrow(layers), subjects.mesh(devices))
    key = jax.random.key(1)
    jax.block_until_ready(jax.device_put(1.0))  # the backend is up
    begin = time.perf_counter()
    jax.make_jaxpr(subject.fn)(key)
    tracing = time.perf_counter() - begin
    compiled = compile_plan(plan(subject.fn, out_shardings=subject.shardings))
    jax.block_until_ready(compiled(key))
    running, _ = timed(compiled, key)
    return {"seconds": tracing + running, "tracing": tracing, "running": running}


def rows(bench: Bench) -> Iterator[Row]:
    """Two rows for each depth, then the growth of shardinit's own time."""
    options = bench.options
    found = {}
    for layers in options.layers:
        sizes = {"layers": layers, "devices": options.devices}
        once = layers >= _SLOW_LAYERS
        mine, theirs, least = bench.measure(
            CASE,
            Job("shardinit", sizes),
            Job("jit", sizes, 1 if once else None),
            Job("floor", sizes),
        )
        found[layers] = mine
        leaves, size = mine[0]["leaves"], mine[0]["total_bytes"]
        note = f"{leaves:,.0f} leaves, {size / 1e6:,.0f} MB"
        if once and options.repeats > 1:
            note += "; jit ran once"
        name = f"cold init, {layers} layers"
        row = CASE.compare(bench, name, mine, theirs, "jit", note=note)
        yield replace(row, target=CASE.targets.get(layers))  # also of a quick run
        tracing, running = (median(least, part) for part in ("tracing", "running"))
        note = f"tracing {tracing:.2f} s, the run {running:.2f} s"
        name, against = f"{name}, over what cannot be saved", "tracing and one warm run"
        row = CASE.compare(bench, name, mine, least, against, over=True, note=note)
        yield replace(row, target=CASE.targets["floor"] if layers == 64 else None)
    if {16, 126} <= found.keys():
        name, against = "shardinit at 126 layers over 16", "shardinit at 16"
        row = CASE.compare(bench, name, found[126], found[16], against, over=True)
        yield replace(row, target=CASE.targets["growth"])


CASE = register(
    name="cold",
    measures="trace to last byte of an unrolled decoder, by depth",
    baseline="jax.jit(init, out_shardings) of the same function",
    sides={"shardinit": ours, "jit": jit, "floor": floor},
    rows=rows,
    targets={
        16: Target(8, 15),
        64: Target(33, 40),
        126: Target(60, 120),
        "floor": Target(1.6, 1.3, higher=False),
        "growth": Target(3, 2, higher=False),
    },
)
