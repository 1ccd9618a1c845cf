"""Planning: 50,000 leaves of an unrolled mixture of experts, on a mesh of no devices.

What an engineer waits for on a laptop before anything is compiled: building the init
function, tracing it, cutting it, grouping equal programs, placing every leaf. A model
of a quarter of the layers shows whether the time grows with the leaves or faster.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

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

_EXPERTS = 128  # 391 leaves a layer: 3 an expert, 7 of attention, norms and router
_FULL_LAYERS = 128
_QUICK_LAYERS = 4
_MESH = (16, 4)  # data x model


def ours(layers: int, experts: int) -> Figures:
    """``shardinit.models.build`` and ``shardinit.plan``."""
    from shardinit.bench import subjects
    from shardinit.core.plan.plan import plan as make_plan
    from shardinit.models import ModelSpec, build

    config = {
        **subjects.NARROW,
        "model_type": "mixtral",
        "num_hidden_layers": layers,
        "num_local_experts": experts,
        "num_experts_per_tok": 2,
        "expert_layout": "unrolled",
    }
    mesh = subjects.abstract_mesh(*_MESH)
    rules = subjects.RULES
    begin = time.perf_counter()
    init_fn = build(ModelSpec("decoder", config))
    built = time.perf_counter()
    plan = make_plan(init_fn, mesh=mesh, rules=rules)
    end = time.perf_counter()
    return {
        "seconds": end - begin,
        "build_seconds": built - begin,
        "plan_seconds": end - built,
        "leaves": len(plan.leaves),
        "programs": len(plan.programs),
    }


def rows(bench: Bench) -> Iterator[Row]:
    """The time, and how it grows against a quarter of the leaves."""
    options = bench.options
    layers = _QUICK_LAYERS if options.quick else _FULL_LAYERS
    experts = _EXPERTS // 16 if options.quick else _EXPERTS

    def job(layers: int) -> Job:
        parameters = {"layers": layers, "experts": experts}
        return Job("shardinit", parameters, options.repeats)

    small, large = bench.measure(CASE, job(layers // 4), job(layers))
    few, many = sample(small, "seconds"), sample(large, "seconds")
    leaves = (small[0]["leaves"], large[0]["leaves"])
    built = sample(large, "build_seconds").median
    yield Row(
        CASE.name,
        f"plan of {leaves[1]:,.0f} leaves",
        many.median,
        "s",
        many,
        None,
        "",
        target=None if options.quick else CASE.targets["seconds"],
        note=f"{built:.1f} s of it building the init function; "
        f"{large[0]['programs']:.0f} programs; peak RSS "
        f"{sample(large, 'peak_bytes', 1e-9).median:.2f} GB",
    )
    yield Row(
        CASE.name,
        f"time a leaf, {leaves[1]:,.0f} over {leaves[0]:,.0f} leaves",
        many.median / leaves[1] / (few.median / leaves[0]),
        "x",
        many,
        few,
        f"shardinit at {leaves[0]:,.0f}",
        target=None if options.quick else CASE.targets["growth"],
        note="1 is linear",
    )


CASE = register(
    Case(
        name="plan",
        measures="building and planning an unrolled mixture of experts",
        baseline="itself with a quarter of the layers",
        sides={"shardinit": ours},
        rows=rows,
        targets={
            "seconds": Target(60, 20, higher=False),
            "growth": Target(1.25, 1.1, higher=False),
        },
    )
)
