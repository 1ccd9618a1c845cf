"""Warm run and its memory: 1.1 billion float32 parameters, compiled beforehand.

The run alone, as a job sees it that plans and compiles ahead. Peak memory is that of
the whole process after its first run, imports and compiler included, over the bytes
of the parameters: 1.0 would be the parameters and nothing else.

Plain jit holds several times the parameters while it runs. Where that does not fit
into the machine, both sides are compared on a model of fewer layers, and the row says
so; shardinit's own figures for the full model then stand in the note.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from shardinit.bench.case import (
    Bench,
    Case,
    Figures,
    Job,
    OutOfMemory,
    Row,
    Target,
    register,
    sample,
)

_FULL_LAYERS = 22
_QUICK_LAYERS = 1
_LAYER_BYTES = 176_000_000  # a layer of TinyLlama in float32
_REST_BYTES = 530_000_000  # its embeddings
_JIT_FACTOR = 4.0  # jit was seen to take 2.3 to 5.2 times the parameters' bytes


def _time(layers: int, devices: int, prepare: Callable[[Any], Any]) -> Figures:
    import jax

    from shardinit.bench import subjects
    from shardinit.bench.child import peak_bytes

    subject = subjects.subject(subjects.tinyllama(layers), devices)
    keys = [jax.random.key(seed) for seed in (1, 2)]
    begin = time.perf_counter()
    run = prepare(subject)
    figures = {"compile_seconds": time.perf_counter() - begin}
    for name, key in zip(("first_seconds", "seconds"), keys, strict=True):
        begin = time.perf_counter()
        result = run(key)
        jax.block_until_ready(result)
        figures[name] = time.perf_counter() - begin
        figures.setdefault("peak_bytes", peak_bytes())
        del result
    figures["total_bytes"] = subject.total_bytes
    return figures


def ours(layers: int, devices: int) -> Figures:
    """A ``CompiledPlan``, called twice."""
    from shardinit.core.plan.plan import plan as make_plan
    from shardinit.core.run.compile import compile_plan

    def prepare(subject: Any) -> Any:
        plan = make_plan(subject.fn, out_shardings=subject.shardings)
        return compile_plan(plan)

    return _time(layers, devices, prepare)


def jit(layers: int, devices: int) -> Figures:
    """The compiled ``jax.jit(init, out_shardings)``, called twice."""
    import jax

    def prepare(subject: Any) -> Any:
        jitted = jax.jit(subject.fn, out_shardings=subject.shardings)
        return jitted.lower(jax.random.key(0)).compile()

    return _time(layers, devices, prepare)


def _compare(bench: Bench) -> tuple[list[Figures], list[Figures], str]:
    """Runs of both sides on the largest model that both can hold, and a note."""
    options = bench.options
    full = _QUICK_LAYERS if options.quick else _FULL_LAYERS

    def job(side: str, layers: int, factor: float) -> Job:
        size = layers * _LAYER_BYTES + _REST_BYTES
        parameters = {"layers": layers, "devices": options.devices}
        return Job(side, parameters, options.repeats, int(size * factor))

    whole = job("shardinit", full, 1.5)
    for layers in [n for n in (full, 20, 18, 16, 12, 8, 4, 2, 1) if n <= full]:
        theirs = job("jit", layers, _JIT_FACTOR)
        if not bench.fits(theirs.needs_bytes):
            continue
        try:
            mine, other = bench.measure(WARM, job("shardinit", layers, 1.5), theirs)
        except OutOfMemory:
            continue
        note = f"{mine[0]['total_bytes'] / 4e9:.2f}B float32 parameters"
        if layers != full:
            (alone,) = bench.measure(WARM, whole)
            seconds = sample(alone, "seconds").median
            peak = sample(alone, "peak_bytes").median / alone[0]["total_bytes"]
            note += (
                f" in {layers} layers, the most that jit can hold here; the full "
                f"{alone[0]['total_bytes'] / 4e9:.2f}B take shardinit {seconds:.2f} s "
                f"and {peak:.2f}x their bytes"
            )
        return mine, other, note
    raise OutOfMemory("plain jit cannot hold even one layer on this machine")


def warm_rows(bench: Bench) -> Iterator[Row]:
    """One row: the second run of either side."""
    mine, theirs, note = bench.once("warm", lambda: _compare(bench))
    value, baseline = sample(mine, "seconds"), sample(theirs, "seconds")
    first = [sample(runs, "first_seconds").median for runs in (mine, theirs)]
    note += f"; first runs {first[0]:.2f} s and {first[1]:.2f} s"
    yield Row(
        WARM.name,
        "warm run",
        baseline.median / value.median,
        "x",
        value,
        baseline,
        "jit",
        target=None if bench.options.quick else WARM.targets["run"],
        note=note,
    )


def memory_rows(bench: Bench) -> Iterator[Row]:
    """One row: peak memory over the parameters' bytes."""
    mine, theirs, note = bench.once("warm", lambda: _compare(bench))
    size = mine[0]["total_bytes"]
    value = sample(mine, "peak_bytes", 1e-9)
    baseline = sample(theirs, "peak_bytes", 1e-9)
    imports = sample(mine, "imports_bytes").median
    ratio = baseline.median * 1e9 / size
    note += f"; jit {ratio:.2f}x; imports alone {imports / 1e9:.2f} GB"
    yield Row(
        MEMORY.name,
        "peak RSS over parameter bytes",
        value.median * 1e9 / size,
        "x",
        value,
        baseline,
        "jit",
        side_unit="GB",
        target=None if bench.options.quick else MEMORY.targets["peak"],
        note=note,
    )


WARM = register(
    Case(
        name="warm",
        measures="run of the compiled plan, 1.1B float32 parameters",
        baseline="the compiled jax.jit(init, out_shardings)",
        sides={"shardinit": ours, "jit": jit},
        rows=warm_rows,
        targets={"run": Target(3, 5)},
    )
)

MEMORY = register(
    Case(
        name="memory",
        measures="peak RSS of that run over the parameters' bytes",
        baseline="the parameters; and jax.jit(init, out_shardings)",
        sides=WARM.sides,
        rows=memory_rows,
        targets={"peak": Target(1.35, 1.15, higher=False)},
    )
)
