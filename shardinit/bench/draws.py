"""Draws: how fast random numbers reach memory, against torch and against a copy.

Initialising is writing. The bound is the memory's bandwidth, measured here by copying
an array on every device at once; on an accelerator a draw should come near it. On CPU
the arithmetic of the counter-based generator weighs more, and torch, which draws from
a sequential generator that no mesh can share, says what a good implementation reaches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
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

_ROWS, _COLUMNS, _QUICK_ROWS = 8192, 8192, 256
_NAMES = {"normal": "normal_", "truncated normal": "trunc_normal_"}


def _rate(run: Callable[[], Any], size: int, times: int = 3) -> float:
    """Bytes a second of the fastest of a few runs, the first not counted."""
    run()
    best = float("inf")
    for _ in range(times):
        begin = time.perf_counter()
        made = run()
        best = min(best, time.perf_counter() - begin)
        del made
    return size / best


def ours(name: str, rows: int, devices: int) -> Figures:
    """A compiled plan of one leaf over all devices, in float32."""
    import jax

    from shardinit.bench import subjects
    from shardinit.core.plan.plan import plan as make_plan
    from shardinit.core.run.compile import compile_plan

    init = jax.nn.initializers
    fn = {"normal": init.normal(), "truncated normal": init.truncated_normal()}[name]
    mesh = subjects.mesh(len(jax.devices()))
    plan = make_plan(lambda key: fn(key, (rows, _COLUMNS)), mesh=mesh)
    exe = compile_plan(plan)

    def run() -> Any:
        return jax.block_until_ready(exe(0))

    return {"rate": _rate(run, plan.total_bytes)}


def torch(name: str, rows: int, devices: int) -> Figures:
    """Torch's in-place initialiser on fresh memory, with all threads."""
    torch: Any = __import__("torch")
    fill = {
        "normal": torch.nn.init.normal_,
        "truncated normal": torch.nn.init.trunc_normal_,
    }[name]
    run = lambda: fill(torch.empty(rows, _COLUMNS))  # noqa: E731
    return {"rate": _rate(run, rows * _COLUMNS * 4)}


def copy(name: str, rows: int, devices: int) -> Figures:
    """An array read and written once on every device: bytes written a second."""
    import jax

    from shardinit.bench import subjects

    mesh = subjects.mesh(len(jax.devices()))
    place = jax.sharding.NamedSharding(mesh, jax.P(mesh.axis_names))
    array = jax.device_put(jax.numpy.ones((rows, _COLUMNS)), place)
    move = jax.jit(lambda x: x + 1.0, out_shardings=place).lower(array).compile()
    run = lambda: jax.block_until_ready(move(array))  # noqa: E731
    return {"rate": _rate(run, array.nbytes), "devices": len(jax.devices())}


def rows(bench: Bench) -> Iterator[Row]:
    """Each distribution against torch, then against the memory."""
    options = bench.options
    count = _QUICK_ROWS if options.quick else _ROWS
    on_cpu = options.platform == "cpu"
    for name, theirs in _NAMES.items():
        parameters = {"name": name, "rows": count, "devices": options.devices}
        jobs = [Job("shardinit", parameters, options.repeats)]
        if on_cpu and find_spec("torch"):
            jobs.append(Job("torch", parameters, options.repeats))
        moved = {**parameters, "name": "copy"}
        *runs, copies = bench.measure(CASE, *jobs, Job("copy", moved, options.repeats))
        mine = sample(runs[0], "rate", 1e-9)
        bound = sample(copies, "rate", 1e-9)
        for other in runs[1:]:
            baseline = sample(other, "rate", 1e-9)
            yield Row(
                CASE.name,
                name,
                mine.median / baseline.median,
                "x",
                mine,
                baseline,
                f"torch {theirs}",
                side_unit="GB/s",
                target=None if options.quick else CASE.targets[name],
            )
        devices = copies[0]["devices"]
        yield Row(
            CASE.name,
            f"{name}, part of the copy bandwidth",
            mine.median / bound.median,
            "x",
            mine,
            bound,
            "copy",
            side_unit="GB/s",
            note=f"{mine.median / devices:.3g} GB/s a device of {devices:.0f}",
        )


CASE = register(
    Case(
        name="draws",
        measures="random numbers into memory, in bytes a second",
        baseline="torch's initialisers; a copy on the same devices",
        sides={"shardinit": ours, "torch": torch, "copy": copy},
        rows=rows,
        targets={"normal": Target(0.7, 1), "truncated normal": Target(8, 15)},
    )
)
