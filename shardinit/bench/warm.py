"""Warm run and its memory: 1.1 billion float32 parameters, compiled beforehand.

The run alone, as a job sees it that plans and compiles ahead. Peak memory is that of
the whole process after its first run, imports and compiler included (of the devices,
where they keep an account), over the bytes of the parameters: 1.0 would be the
parameters and nothing else.

Plain jit holds several times the parameters while it runs. Where that does not fit
into the machine, both sides are compared on a model of fewer layers, and the row says
so; shardinit's own figures for the full model then stand in the note.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from shardinit.bench import subjects
from shardinit.bench.case import (
    Bench,
    Figures,
    Job,
    OutOfMemory,
    Row,
    Target,
    median,
    register,
    sample,
    timed,
)

_FULL_LAYERS = 22
_LAYER_BYTES = 176_000_000  # a layer of TinyLlama in float32
_REST_BYTES = 530_000_000  # its embeddings
_JIT_FACTOR = 4.0  # jit was seen to take 2.3 to 5.2 times the parameters' bytes


def _time(
    layers: int, devices: int, prepare: Callable[[subjects.Subject], Any]
) -> Figures:
    import jax

    subject = subjects.subject(subjects.tinyllama(layers), subjects.mesh(devices))
    keys = [jax.random.key(seed) for seed in (1, 2)]
    compiling, run = timed(prepare, subject)
    first, result = timed(run, keys[0])
    peak = subjects.peak_bytes()
    # The second run with the first one's arrays still there would take twice the
    # memory.
    del result
    return {
        "compile_seconds": compiling,
        "first_seconds": first,
        "seconds": timed(run, keys[1])[0],
        "peak_bytes": peak,
        "total_bytes": subject.total_bytes,
    }


def ours(layers: int, devices: int) -> Figures:
    """A ``CompiledPlan``, called twice."""
    from shardinit.core.plan.planning import plan as make_plan
    from shardinit.core.run.compile import compile_plan

    def prepare(subject: subjects.Subject) -> Any:
        plan = make_plan(subject.fn, out_shardings=subject.shardings)
        return compile_plan(plan)

    return _time(layers, devices, prepare)


def jit(layers: int, devices: int) -> Figures:
    """The compiled ``jax.jit(init, out_shardings)``, called twice."""
    import jax

    def prepare(subject: subjects.Subject) -> Any:
        jitted = jax.jit(subject.fn, out_shardings=subject.shardings)
        return jitted.lower(jax.random.key(0)).compile()

    return _time(layers, devices, prepare)


@functools.cache  # for both cases
def _compare(bench: Bench) -> tuple[list[Figures], list[Figures], str]:
    """Runs of both sides on the largest model that both can hold, and a note."""
    options = bench.options
    full = 1 if options.quick else _FULL_LAYERS

    def job(side: str, layers: int, factor: float) -> Job:
        size = layers * _LAYER_BYTES + _REST_BYTES
        sizes = {"layers": layers, "devices": options.devices}
        return Job(side, sizes, needs_bytes=int(size * factor))

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
            (alone,) = bench.measure(WARM, job("shardinit", full, 1.5))
            peak = median(alone, "peak_bytes") / alone[0]["total_bytes"]
            note += (
                f" in {layers} layers, the most that jit can hold here; the full "
                f"{alone[0]['total_bytes'] / 4e9:.2f}B take shardinit "
                f"{median(alone, 'seconds'):.2f} s and {peak:.2f}x their bytes"
            )
        return mine, other, note
    raise OutOfMemory("plain jit cannot hold even one layer on this machine")


def warm_rows(bench: Bench) -> Iterator[Row]:
    """One row: the second run of either side."""
    mine, theirs, note = _compare(bench)
    first = [median(runs, "first_seconds") for runs in (mine, theirs)]
    note += f"; first runs {first[0]:.2f} s and {first[1]:.2f} s"
    yield WARM.compare(bench, "warm run", mine, theirs, "jit", target="run", note=note)


def memory_rows(bench: Bench) -> Iterator[Row]:
    """One row: peak memory over the parameters' bytes."""
    mine, theirs, note = _compare(bench)
    size = mine[0]["total_bytes"] / 1e9
    ours, jit = (sample(runs, "peak_bytes", 1e-9) for runs in (mine, theirs))
    imports = median(mine, "imports_bytes", 1e-9)
    note += f"; jit {jit.median / size:.2f}x; imports alone {imports:.2f} GB"
    yield MEMORY.row(
        bench,
        "peak RSS over parameter bytes"
        if bench.options.platform == "cpu"
        else "peak memory of the devices over parameter bytes",
        ours.median / size,
        ours,
        baseline=jit,
        against="jit",
        side_unit="GB",
        target="peak",
        note=note,
    )


WARM = register(
    name="warm",
    measures="run of the compiled plan, 1.1B float32 parameters",
    baseline="the compiled jax.jit(init, out_shardings)",
    sides={"shardinit": ours, "jit": jit},
    rows=warm_rows,
    targets={"run": Target(3, 5)},
)

MEMORY = register(
    name="memory",
    measures="peak RSS of that run over the parameters' bytes",
    baseline="the parameters; and jax.jit(init, out_shardings)",
    sides=WARM.sides,
    rows=memory_rows,
    targets={"peak": Target(1.35, 1.15, higher=False)},
)
