"""Orthogonal leaves: layers stacked, one large matrix, and the one that shards.

A QR needs all of its matrix: where devices share a processor one of them does it, else
each does; ``shardinit.initializers.orthogonal`` makes blocks that each can have alone.

Plain jit is given one device and hands the leaf out: on several simulated ones the QRs
of stacked matrices wait for their own threads, for ever (``core.run.shards``). Either
side has OpenBLAS on one thread: with more they wait for each other by turning.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

from shardinit.bench import subjects
from shardinit.bench.case import Bench, Figures, Job, Row, Target, register, timed

_SUBJECTS = {
    "stacked": "{layers} stacked matrices of {width}x{width}",
    "one": "one matrix of {size}x{size}",
    "blocks": "initializers.orthogonal, {size}x{size}",
}


def _function(kind: str, layers: int, width: int) -> Callable[[Any], Any]:
    import jax

    from shardinit.initializers import orthogonal

    own, size = jax.nn.initializers.orthogonal(), _size(layers, width)

    def stacked(key: Any) -> Any:
        keys = jax.random.split(key, layers)
        return jax.vmap(lambda key: own(key, (width, width)))(keys)

    return {
        "stacked": stacked,
        "one": lambda key: own(key, (size, size)),
        "blocks": lambda key: orthogonal()(key, (size, size)),
    }[kind]


def _size(layers: int, width: int) -> int:
    """Rows of one matrix that takes about as long as the stack."""
    return width * max(round(layers ** (1 / 3)), 1)


def _time(
    kind: str,
    layers: int,
    width: int,
    devices: int,
    compiled: Callable[[Any, Any], Callable[[Any], Any]],
) -> Figures:
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # before anything imports SciPy
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    mesh = subjects.mesh(devices)
    place = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    run = compiled(_function(kind, layers, width), place)
    keys = [jax.random.key(seed) for seed in (1, 2)]
    first, _ = timed(run, keys[0])
    return {"first_seconds": first, "seconds": timed(run, keys[1])[0]}


def ours(kind: str, layers: int, width: int, devices: int) -> Figures:
    """The second run of a plan."""
    from shardinit.core.plan.planning import plan
    from shardinit.core.run.compile import compile_plan

    def compiled(fn: Any, place: Any) -> Any:
        return compile_plan(plan(fn, out_shardings=place))

    return _time(kind, layers, width, devices, compiled)


def jit(kind: str, layers: int, width: int, devices: int) -> Figures:
    """The second run of ``jax.jit(init)`` on one device, then ``device_put``."""

    def compiled(fn: Any, place: Any) -> Any:
        import jax

        made = jax.jit(fn)
        return lambda key: jax.device_put(made(key), place)

    return _time(kind, layers, width, devices, compiled)


def rows(bench: Bench) -> Iterator[Row]:
    """A row for each kind."""
    layers, width = (8, 32) if bench.options.quick else (64, 512)
    sizes = {"layers": layers, "width": width, "devices": bench.options.devices}
    for kind, name in _SUBJECTS.items():
        jobs = (Job(side, {"kind": kind} | sizes) for side in CASE.sides)
        mine, theirs = bench.measure(CASE, *jobs)
        told = name.format(**sizes, size=_size(layers, width))
        against = "jit on one device, device_put"
        yield CASE.compare(bench, told, mine, theirs, against, target=kind)


CASE = register(
    name="orthogonal",
    measures="orthogonal leaves: stacked, one, and in blocks, warm",
    baseline="jax.jit(init) on one device, then device_put",
    sides={"shardinit": ours, "jit": jit},
    rows=rows,
    targets={"stacked": Target(1, 4), "one": Target(1, 2), "blocks": Target(1, 2)},
)
