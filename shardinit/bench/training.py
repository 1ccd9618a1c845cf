"""Training state: what Adam's moments add to the parameters alone.

Moments are zeros where their parameters lie, so they should cost hardly a dispatch and
hardly a program to compile.
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
    register,
    sample,
    timed,
)

_LAYERS = 64


def _time(layers: int, devices: int, *, adam: bool) -> Figures:
    import jax
    import optax

    from shardinit.core.plan.planning import plan as make_plan
    from shardinit.core.run.compile import compile_plan
    from shardinit.frontends.optax import with_optimizer

    fn = subjects.narrow(layers)
    on, by = subjects.mesh(devices), subjects.rules()
    jax.block_until_ready(jax.device_put(1.0))  # the backend is up
    programs: list[int] = []

    def init() -> object:
        whole = with_optimizer(fn, optax.adam(1e-3)) if adam else fn
        plan = make_plan(whole, mesh=on, rules=by)
        compiled = compile_plan(plan)
        programs.append(len(compiled.executables))
        return compiled(1)

    seconds, _ = timed(init)
    return {"seconds": seconds, "programs": programs[-1]}


def state(layers: int, devices: int) -> Figures:
    """Parameters and Adam's state: trace to last byte."""
    return _time(layers, devices, adam=True)


def parameters(layers: int, devices: int) -> Figures:
    """The parameters alone."""
    return _time(layers, devices, adam=False)


def rows(bench: Bench) -> Iterator[Row]:
    """The time and the programs of the state over those of the parameters alone."""
    layers = min(_LAYERS, max(bench.options.layers))
    sizes = {"layers": layers, "devices": bench.options.devices}
    mine, alone = bench.measure(CASE, Job("shardinit", sizes), Job("parameters", sizes))
    against = "parameters alone"
    name = f"cold init with Adam, {layers} layers"
    yield CASE.compare(bench, name, mine, alone, against, over=True, target="seconds")
    ours, other = sample(mine, "programs"), sample(alone, "programs")
    name = f"programs with Adam, {layers} layers"
    yield CASE.row(
        bench,
        name,
        ours / other,
        ours,
        target="programs",
        baseline=other,
        against=against,
        side_unit="",
    )


CASE = register(
    name="training",
    measures="parameters with Adam's state, trace to last byte",
    baseline="the parameters alone",
    sides={"shardinit": state, "parameters": parameters},
    rows=rows,
    targets={
        "seconds": Target(2.2, 1.5, higher=False),
        "programs": Target(1.3, 1.0, higher=False),
    },
)
