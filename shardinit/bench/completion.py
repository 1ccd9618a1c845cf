"""Memory of a completion: what a restored tree and what it lacks take together.

A checkpoint is there already when it is completed; what is made beside it should cost
no more than itself. Peak memory is that of the whole process, imports and compiler
included (of the devices, where they keep an account).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from shardinit.bench import subjects
from shardinit.bench.case import (
    Bench,
    Figures,
    Job,
    Row,
    Target,
    median,
    register,
    sample,
    timed,
)
from shardinit.core.paths import keys_of, nested

if TYPE_CHECKING:
    import jax

    from shardinit.core.plan.plan import Plan


def deepen(layers: int, devices: int) -> Figures:
    """``init_missing`` of a decoder with one layer more than what is there."""
    from shardinit.core.plan.planning import plan as make_plan

    fn, mesh = subjects.tinyllama(layers), subjects.mesh(devices)
    plan = make_plan(fn, mesh=mesh, rules=subjects.rules())
    last = f"layers/{layers - 1}/"
    there = [leaf for leaf in plan.leaves if not leaf.path.startswith(last)]
    restored = _restored({leaf.path: leaf for leaf in there})
    return _completed(restored, fn, plan, rules=subjects.rules())


def stacked(layers: int, devices: int) -> Figures:
    """``init_missing`` of layers under a scan, of a checkpoint of unscanned ones."""
    import jax

    from shardinit.core.plan.fsdp import fsdp
    from shardinit.core.plan.planning import plan as make_plan

    names, shape = [f"w{i}" for i in range(16)], (1024, 2048)

    def draw(key: jax.Array, size: tuple[int, ...]) -> dict[str, jax.Array]:
        keys = dict(zip(names, jax.random.split(key, len(names)), strict=True))
        return {name: jax.random.normal(one, size) for name, one in keys.items()}

    def unscanned(key: jax.Array) -> dict[str, Any]:
        keys = jax.random.split(key, layers)
        return {f"layer_{i}": draw(one, shape) for i, one in enumerate(keys)}

    def scanned(key: jax.Array) -> dict[str, Any]:
        return {"layers": draw(key, (layers, *shape))}

    told: dict[str, Any] = {"mesh": subjects.mesh(devices), "rules": fsdp()}
    old = make_plan(unscanned, **told)
    restored = _restored({leaf.path: leaf for leaf in old.leaves})
    plan, paths = make_plan(scanned, **told), "layer_*/{w} -> layers/{w} : stack"
    return _completed(restored, scanned, plan, rules=fsdp(), paths=paths)


def _restored(leaves: dict[str, Any]) -> dict[str, Any]:
    """Arrays as a checkpoint would give them: every page of them is written."""
    import jax
    import numpy as np

    def shard(leaf: Any, index: Any) -> np.ndarray:
        shape = [
            len(range(*s.indices(n))) for s, n in zip(index, leaf.shape, strict=True)
        ]
        # Not zeros, whose pages Linux gives only when they are written to.
        return np.full(shape, 0.5, leaf.dtype)

    arrays = [
        jax.make_array_from_callback(
            leaf.shape, leaf.sharding, functools.partial(shard, leaf)
        )
        for leaf in leaves.values()
    ]
    return nested(map(keys_of, leaves), arrays)


def _completed(restored: Any, fn: Any, plan: Plan, **told: Any) -> Figures:
    from shardinit.core.run.missing import init_missing

    before = subjects.peak_bytes()
    seconds, made = timed(init_missing, restored, fn, 0, mesh=plan.mesh, **told)
    peak = subjects.peak_bytes()
    del made
    sizes = {"before_bytes": before, "total_bytes": plan.total_bytes}
    return {"seconds": seconds, "peak_bytes": peak, **sizes}


def peak_rows(bench: Bench) -> Iterator[Row]:
    """Peak memory over what is there and made: the process, imports and all."""
    options = bench.options
    stack = 2 if options.quick else 24
    for name, side, layers, held, target in (
        ("one new layer", "shardinit", 2 if options.quick else 22, 1, "peak"),
        ("layers stacked from unscanned ones", "stacked", stack, 2, "stacked"),
    ):
        sizes = {"layers": layers, "devices": options.devices}
        needs = int(held * 1.3 * (layers * 176_000_000 + 530_000_000))
        (runs,) = bench.measure(PEAK, Job(side, sizes, needs_bytes=needs))
        size = runs[0]["total_bytes"] / 1e9
        peak = sample(runs, "peak_bytes", 1e-9)
        yield PEAK.row(
            bench,
            f"completion, {name}: peak over parameter bytes",
            peak.median / size,
            peak,
            side_unit="GB",
            target=target,
            note=f"{size / 4:.2f}B float32 parameters in {layers} layers; before it "
            f"{median(runs, 'before_bytes', 1e-9):.2f} GB; compilation in it, "
            f"{median(runs, 'seconds'):.1f} s",
        )


PEAK = register(
    name="completion",
    measures="peak memory of completing a restored tree",
    baseline="the parameters' bytes",
    sides={"shardinit": deepen, "stacked": stacked},
    rows=peak_rows,
    targets={
        "peak": Target(1.2, 1.1, higher=False),
        "stacked": Target(2.4, 2.2, higher=False),
    },
)
