"""Draws: how fast random numbers reach memory, and how far from this machine's limits.

Initialising is writing, and random numbers are arithmetic: threefry hashes a counter
for every 32 bits. Two limits are measured on the same devices in the same run: a
*copy*, and *hashing*, blocks of threefry whose counters stay in the processor. At four
bytes a block no draw of 32 bits is meant to pass it, and what follows the hash
(``log1p`` and a polynomial for a normal) comes on top. On CPU torch, which draws from a
sequential generator that no mesh can share, says what a good implementation reaches.
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
# Counters a device, and blocks of threefry in one step: on CPU the counters stay in a
# core's cache, and a longer chain waits for its own results; elsewhere many threads
# hide that, and a step has to be worth its launch.
_HASHED = {"cpu": (1 << 14, 1)}
_HASHED_ELSEWHERE = (1 << 20, 16)
_RATE: dict[str, Any] = {"figure": "rate", "over": True, "unit": "GB/s"}
_TORCH = {"normal": "normal_", "truncated normal": "trunc_normal_"}
_NAMES = ("normal", "truncated normal", "uniform", "bernoulli", "ones")


def _function(name: str) -> Callable[[Any, Any], Any]:
    """From a key and a shape to float32."""
    import jax

    init = jax.nn.initializers
    return {
        "normal": init.normal(),
        "truncated normal": init.truncated_normal(),
        "uniform": jax.random.uniform,
        "bernoulli": lambda key, shape: jax.random.bernoulli(key, 0.1, shape) * 1.0,
        "ones": lambda key, shape: jax.numpy.ones(shape),
    }[name]


def _rate(run: Callable[[], Any], size: int) -> float:
    """Bytes a second of the fastest of a few runs, the first not counted."""
    run()
    return size / min(timed(run)[0] for _ in range(3))


def ours(name: str, rows: int, devices: int) -> Figures:
    """A compiled plan of one leaf over all devices, in float32."""
    import jax

    from shardinit.core.plan.planning import plan as make_plan
    from shardinit.core.run.compile import compile_plan

    fn, mesh = _function(name), subjects.mesh(len(jax.devices()))
    plan = make_plan(lambda key: fn(key, (rows, _COLUMNS)), mesh=mesh)
    compiled = compile_plan(plan)
    return {"rate": _rate(lambda: compiled(0), plan.total_bytes)}


def jit(name: str, rows: int, devices: int) -> Figures:
    """``jax.jit`` of the same function with the same sharding."""
    import jax

    fn, place = _function(name), _place(subjects.mesh(len(jax.devices())))
    made = jax.jit(lambda key: fn(key, (rows, _COLUMNS)), out_shardings=place)
    key = jax.random.key(0)
    return {"rate": _rate(lambda: made(key), rows * _COLUMNS * 4)}


def torch(name: str, rows: int, devices: int) -> Figures:
    """Torch's in-place initialiser on fresh memory, with all threads."""
    torch: Any = __import__("torch")
    fill = getattr(torch.nn.init, _TORCH[name])
    size = rows * _COLUMNS * 4
    return {"rate": _rate(lambda: fill(torch.empty(rows, _COLUMNS)), size)}


def copy(name: str, rows: int, devices: int) -> Figures:
    """An array read and written once on every device: bytes written a second."""
    import jax

    mesh = subjects.mesh(len(jax.devices()))
    place = _place(mesh)
    array = jax.device_put(jax.numpy.ones((rows, _COLUMNS)), place)
    move = jax.jit(lambda x: x + 1.0, out_shardings=place).lower(array).compile()
    return {"rate": _rate(lambda: move(array), array.nbytes), "devices": mesh.size}


def hashing(name: str, rows: int, devices: int) -> Figures:
    """Threefry alone on every device: four bytes a block, a second."""
    import jax
    import jax.numpy as jnp

    from shardinit.core.prng.threefry import hash_on_device

    mesh, kind = subjects.mesh(len(jax.devices())), jax.devices()[0].platform
    counters, chained = _HASHED.get(kind, _HASHED_ELSEWHERE)
    steps = max(rows * _COLUMNS // (counters * chained * mesh.size), 1)

    def step(_: int, words: tuple[Any, Any]) -> tuple[Any, Any]:
        for _ in range(chained):
            words = hash_on_device(*key, *words)
        return words

    key = jnp.uint32(1), jnp.uint32(2)
    start = jnp.zeros((counters * mesh.size,), jnp.uint32)
    start = jax.device_put(start, _place(mesh))
    run = jax.jit(lambda x: jax.lax.fori_loop(0, steps, step, (x, x))[0])
    return {"rate": _rate(lambda: run(start), start.nbytes * chained * steps)}


def _place(mesh: Any) -> Any:
    import jax

    return jax.sharding.NamedSharding(mesh, jax.P(mesh.axis_names))


def rows(bench: Bench) -> Iterator[Row]:
    """Each distribution against torch and jit, then against the machine's limits."""
    options = bench.options
    count = 512 if options.quick else 8192
    sizes = {"rows": count, "devices": options.devices}
    has_torch = options.platform == "cpu" and find_spec("torch") is not None
    for name in _NAMES:
        jobs = {
            "shardinit": Job("shardinit", {"name": name, **sizes}),
            "jit": Job("jit", {"name": name, **sizes}),
            "copy": Job("copy", {"name": "copy", **sizes}),
        }
        if name != "ones":
            jobs["hashing"] = Job("hashing", {"name": "hashing", **sizes})
        if has_torch and name in _TORCH:
            jobs["torch"] = Job("torch", {"name": name, **sizes})
        runs = dict(zip(jobs, bench.measure(CASE, *jobs.values()), strict=True))
        yield from _rows_of(bench, name, runs)


def _rows_of(bench: Bench, name: str, runs: dict[str, list[Figures]]) -> Iterator[Row]:
    mine, copies = runs["shardinit"], runs["copy"]
    if "torch" in runs:
        yield CASE.compare(
            bench,
            name,
            mine,
            runs["torch"],
            f"torch {_TORCH[name]}",
            target=name,
            **_RATE,
        )
    yield CASE.compare(bench, name, mine, runs["jit"], "jit", **_RATE)
    rate, devices = median(mine, "rate", 1e-9), copies[0]["devices"]
    note = f"{rate / devices:.3g} GB/s a device of {devices:.0f}"
    part = f"{name}, part of the copy bandwidth"
    yield CASE.compare(bench, part, mine, copies, "copy", note=note, **_RATE)
    if "hashing" in runs:
        part, limit = f"{name}, part of threefry alone", runs["hashing"]
        yield CASE.compare(bench, part, mine, limit, "hashing", **_RATE)


CASE = register(
    name="draws",
    measures="random numbers into memory, in bytes a second",
    baseline="jit and torch; a copy, and threefry alone, on the same devices",
    sides={
        "shardinit": ours,
        "jit": jit,
        "torch": torch,
        "copy": copy,
        "hashing": hashing,
    },
    rows=rows,
    targets={"normal": Target(0.7, 1), "truncated normal": Target(8, 15)},
)
