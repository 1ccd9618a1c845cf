"""Draws: how fast random numbers reach memory, against torch and against a copy.

Initialising is writing. The bound is the memory's bandwidth, measured here by copying
an array on every device at once; on an accelerator a draw should come near it. On CPU
the arithmetic of the counter-based generator weighs more, and torch, which draws from
a sequential generator that no mesh can share, says what a good implementation reaches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
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

_COLUMNS = 8192
_RATE: dict[str, Any] = {"figure": "rate", "over": True, "unit": "GB/s"}
_NAMES = {"normal": "normal_", "truncated normal": "trunc_normal_"}


def _rate(run: Callable[[], Any], size: int) -> float:
    """Bytes a second of the fastest of a few runs, the first not counted."""
    run()
    return size / min(timed(run)[0] for _ in range(3))


def ours(name: str, rows: int, devices: int) -> Figures:
    """A compiled plan of one leaf over all devices, in float32."""
    import jax

    from shardinit.core.plan.plan import plan as make_plan
    from shardinit.core.run.compile import compile_plan

    init = jax.nn.initializers
    fn = {"normal": init.normal(), "truncated normal": init.truncated_normal()}[name]
    mesh = subjects.mesh(len(jax.devices()))
    plan = make_plan(lambda key: fn(key, (rows, _COLUMNS)), mesh=mesh)
    compiled = compile_plan(plan)
    return {"rate": _rate(lambda: compiled(0), plan.total_bytes)}


def torch(name: str, rows: int, devices: int) -> Figures:
    """Torch's in-place initialiser on fresh memory, with all threads."""
    torch: Any = __import__("torch")
    fill = getattr(torch.nn.init, _NAMES[name])
    size = rows * _COLUMNS * 4
    return {"rate": _rate(lambda: fill(torch.empty(rows, _COLUMNS)), size)}


def copy(name: str, rows: int, devices: int) -> Figures:
    """An array read and written once on every device: bytes written a second."""
    import jax

    mesh = subjects.mesh(len(jax.devices()))
    place = jax.sharding.NamedSharding(mesh, jax.P(mesh.axis_names))
    array = jax.device_put(jax.numpy.ones((rows, _COLUMNS)), place)
    move = jax.jit(lambda x: x + 1.0, out_shardings=place).lower(array).compile()
    return {"rate": _rate(lambda: move(array), array.nbytes), "devices": mesh.size}


def rows(bench: Bench) -> Iterator[Row]:
    """Each distribution against torch, then against the memory."""
    options = bench.options
    count = 256 if options.quick else 8192
    sides = ["shardinit"]
    if options.platform == "cpu" and find_spec("torch"):
        sides.append("torch")
    for name, theirs in _NAMES.items():
        sizes = {"name": name, "rows": count, "devices": options.devices}
        *runs, copies = bench.measure(
            CASE,
            *(Job(side, sizes) for side in sides),
            Job("copy", {**sizes, "name": "copy"}),
        )
        mine, *others = runs
        for other in others:
            yield CASE.compare(
                bench, name, mine, other, f"torch {theirs}", target=name, **_RATE
            )
        rate, devices = median(mine, "rate", 1e-9), copies[0]["devices"]
        note = f"{rate / devices:.3g} GB/s a device of {devices:.0f}"
        part = f"{name}, part of the copy bandwidth"
        yield CASE.compare(bench, part, mine, copies, "copy", note=note, **_RATE)


CASE = register(
    name="draws",
    measures="random numbers into memory, in bytes a second",
    baseline="torch's initialisers; a copy on the same devices",
    sides={"shardinit": ours, "torch": torch, "copy": copy},
    rows=rows,
    targets={"normal": Target(0.7, 1), "truncated normal": Target(8, 15)},
)
