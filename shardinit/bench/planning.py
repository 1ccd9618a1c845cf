"""Planning: 50,000 leaves of an unrolled mixture of experts, on a mesh of no devices.

What an engineer waits for on a laptop before anything is compiled: building the init
function, tracing it, cutting it, grouping equal programs, placing every leaf. A model
of a quarter of the layers shows whether the time grows with the leaves or faster; a
plan of the plan with other rules, what is kept of the first.
"""

from __future__ import annotations

from collections.abc import Iterator

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
from shardinit.models import ModelSpec, build

_EXPERTS = 128  # 391 leaves a layer: 3 an expert, 7 of attention, norms and router


def ours(layers: int, experts: int) -> Figures:
    """``shardinit.models.build`` and ``shardinit.plan``."""
    from shardinit.core.plan.fsdp import fsdp
    from shardinit.core.plan.planning import plan as make_plan

    config = {
        **subjects.NARROW,
        "model_type": "mixtral",
        "num_hidden_layers": layers,
        "num_local_experts": experts,
        "num_experts_per_tok": 2,
        "expert_layout": "unrolled",
    }
    mesh, rules = subjects.abstract_mesh(), subjects.rules()
    building, init_fn = timed(build, ModelSpec("decoder", config))
    planning, plan = timed(make_plan, init_fn, mesh=mesh, rules=rules)
    again, _ = timed(make_plan, plan, mesh=mesh, rules=fsdp())
    return {
        "seconds": building + planning,
        "build_seconds": building,
        "plan_seconds": planning,
        "again_seconds": again,
        "leaves": len(plan.leaves),
        "programs": len(plan.programs),
    }


def rows(bench: Bench) -> Iterator[Row]:
    """The time, and how it grows against a quarter of the leaves."""
    quick = bench.options.quick
    layers, experts = (4, _EXPERTS // 16) if quick else (128, _EXPERTS)
    sizes = [{"layers": n, "experts": experts} for n in (layers // 4, layers)]
    small, large = bench.measure(CASE, *(Job("shardinit", size) for size in sizes))
    few, many = small[0]["leaves"], large[0]["leaves"]
    seconds, other = sample(large, "seconds"), sample(small, "seconds")
    yield CASE.row(
        bench,
        f"plan of {many:,.0f} leaves",
        seconds.median,
        seconds,
        unit="s",
        target="seconds",
        note=f"{median(large, 'build_seconds'):.1f} s of it building the init "
        f"function; {large[0]['programs']:.0f} programs; peak RSS "
        f"{median(large, 'peak_bytes', 1e-9):.2f} GB",
    )
    yield CASE.row(
        bench,
        f"time a leaf, {many:,.0f} over {few:,.0f} leaves",
        seconds / other * few / many,
        seconds,
        baseline=other,
        against=f"shardinit at {few:,.0f}",
        target="growth",
        note="1 is linear",
    )
    again = sample(large, "again_seconds")
    yield CASE.row(
        bench,
        f"plan of {many:,.0f} leaves once more, with other rules",
        again / seconds,
        again,
        baseline=seconds,
        against="the first",
        target="again",
        note="the trace is kept",
    )


CASE = register(
    name="plan",
    measures="building and planning an unrolled mixture of experts",
    baseline="itself with a quarter of the layers",
    sides={"shardinit": ours},
    rows=rows,
    targets={
        "seconds": Target(60, 20, higher=False),
        "growth": Target(1.25, 1.1, higher=False),
        "again": Target(0.1, 0.1, higher=False),
    },
)
