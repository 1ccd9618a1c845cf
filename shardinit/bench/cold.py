"""Cold start: from an init function that JAX has never seen to the last byte.

What a job waits for before its first step. Plain ``jax.jit`` compiles one program for
the whole model, so that its time grows with depth, faster than linearly. The model is
narrow, so that compiling and dispatching are what is measured.
"""

from __future__ import annotations

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

_SLOW_LAYERS = 64  # from here on plain jit takes minutes: one run of it


def _time(layers: int, devices: int, init: Any) -> Figures:
    import jax

    from shardinit.bench import subjects

    subject = subjects.subject(subjects.narrow(layers), devices)
    key = jax.random.key(1)
    jax.block_until_ready(jax.device_put(1.0))  # the backend is up
    begin = time.perf_counter()
    jax.block_until_ready(init(subject, key))
    seconds = time.perf_counter() - begin
    return {
        "seconds": seconds,
        "leaves": subject.leaves,
        "total_bytes": subject.total_bytes,
    }


def ours(layers: int, devices: int) -> Figures:
    """``shardinit.init``: cut, plan, compile, run."""
    from shardinit.core.run.compile import init

    return _time(
        layers,
        devices,
        lambda subject, key: init(subject.fn, key, out_shardings=subject.shardings),
    )


def jit(layers: int, devices: int) -> Figures:
    """``jax.jit(init, out_shardings)``: trace, compile, run."""
    import jax

    return _time(
        layers,
        devices,
        lambda subject, key: jax.jit(subject.fn, out_shardings=subject.shardings)(key),
    )


def rows(bench: Bench) -> Iterator[Row]:
    """One row for each depth, then the growth of shardinit's own time."""
    options = bench.options
    found = {}
    for layers in options.layers:
        parameters = {"layers": layers, "devices": options.devices}
        once = layers >= _SLOW_LAYERS
        mine, theirs = bench.measure(
            CASE,
            Job("shardinit", parameters, options.repeats),
            Job("jit", parameters, 1 if once else options.repeats),
        )
        found[layers] = sample(mine, "seconds")
        baseline = sample(theirs, "seconds")
        leaves, size = mine[0]["leaves"], mine[0]["total_bytes"]
        yield Row(
            CASE.name,
            f"cold init, {layers} layers",
            baseline.median / found[layers].median,
            "x",
            found[layers],
            baseline,
            "jit",
            target=CASE.targets.get(layers),
            note=f"{leaves:,.0f} leaves, {size / 1e6:,.0f} MB"
            + ("; jit ran once" if once and options.repeats > 1 else ""),
        )
    if {16, 126} <= found.keys():
        yield Row(
            CASE.name,
            "shardinit at 126 layers over 16",
            found[126].median / found[16].median,
            "x",
            found[126],
            found[16],
            "shardinit at 16",
            target=CASE.targets["growth"],
        )


CASE = register(
    Case(
        name="cold",
        measures="trace to last byte of an unrolled decoder, by depth",
        baseline="jax.jit(init, out_shardings) of the same function",
        sides={"shardinit": ours, "jit": jit},
        rows=rows,
        targets={
            16: Target(8, 15),
            64: Target(40, 60),
            126: Target(60, 120),
            "growth": Target(3, 2, higher=False),
        },
    )
)
