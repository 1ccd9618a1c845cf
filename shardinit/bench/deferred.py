"""Deferred trees: 100,000 parameters built, checked, planned and renamed, no arrays.

What waits for its value must not make anybody wait. Each parameter has an initializer
of its own, a new function, as model-building code makes them, so that nothing is
remembered from one parameter to the next. A tree of a quarter of the parameters shows
whether the time grows with them or faster. Names are wide: among 100,000, two are more
likely than not to have the same 32 bits.

The figures are seconds of processor time: one thread does all of it and waits for
nothing, and a tenth of a millisecond a parameter drowns in what else a machine does.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator

from shardinit.bench import subjects
from shardinit.bench.case import (
    Bench,
    Figures,
    Job,
    Row,
    Sample,
    Target,
    median,
    register,
    sample,
)

_A_LAYER = 10
_UNIT = 10_000
_STEPS = {
    "build": "with a trace of each initializer, and a prefix for each layer",
    "names": "duplicates, over the whole tree",
    "plan": "init_fn and shardinit.plan, on a mesh of no devices",
    "rename": "one more prefix for the whole tree",
}


def ours(parameters: int) -> Figures:
    """Times each step on one tree."""
    import jax

    from shardinit import deferred
    from shardinit.core.plan.planning import plan as make_plan

    def weight(name: str) -> deferred.UninitializedParameter[jax.Array]:
        def draw(key: jax.Array) -> jax.Array:
            return jax.random.normal(key, (64, 64)) * 0.02

        return deferred.UninitializedParameter(draw, name)

    def layer(number: int) -> list[deferred.UninitializedParameter[jax.Array]]:
        weights = [weight(f"weight_{n}") for n in range(_A_LAYER)]
        return deferred.add_parameter_prefix(f"layer_{number}", weights)

    seconds: Figures = {}
    begin = time.process_time()

    def lap(step: str) -> None:
        nonlocal begin
        seconds[step] = time.process_time() - begin
        gc.collect()  # what one step leaves behind is not the next one's work
        begin = time.process_time()

    model = [layer(number) for number in range(parameters // _A_LAYER)]
    lap("build")
    deferred.check_no_duplicated_parameters(model)
    lap("names")
    init_fn = deferred.init_fn(model, wide_names=True)
    plan = make_plan(init_fn, mesh=subjects.abstract_mesh())
    lap("plan")
    deferred.add_parameter_prefix("model", model)
    lap("rename")
    return {**seconds, "parameters": len(plan.leaves), "programs": len(plan.programs)}


def rows(bench: Bench) -> Iterator[Row]:
    """Seconds for 10,000 parameters, step by step, and how each grows."""
    count = 400 if bench.options.quick else 100_000
    jobs = [Job("shardinit", {"parameters": n}) for n in (count // 4, count)]
    small, large = bench.measure(CASE, *jobs)
    for step, note in _STEPS.items():
        few = sample(small, step, _UNIT / small[0]["parameters"])
        many = sample(large, step, _UNIT / large[0]["parameters"])
        name = f"{step}, {_UNIT:,} of {count:,} parameters"
        yield CASE.row(bench, name, many.median, many, unit="s", note=note)
        yield CASE.row(
            bench,
            f"{step}, a parameter, {count:,} over {count // 4:,}",
            many / few,
            many,
            baseline=few,
            against=f"shardinit at {count // 4:,}",
            target="growth",
            note="1 is linear",
        )
    total = Sample(tuple(sum(run[step] for step in _STEPS) for run in large))
    note = (
        f"{large[0]['programs']:.0f} programs; "
        f"peak RSS {median(large, 'peak_bytes', 1e-9):.2f} GB"
    )
    name = f"all four, {count:,} parameters"
    yield CASE.row(bench, name, total.median, total, unit="s", note=note)


CASE = register(
    name="deferred",
    measures="building, checking, planning and renaming a deferred tree",
    baseline="itself with a quarter of the parameters",
    sides={"shardinit": ours},
    rows=rows,
    targets={"growth": Target(1.25, 1.1, higher=False)},
)
