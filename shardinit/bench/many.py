"""Many at once: an ensemble inside one function, and a sweep of calls of one plan.

An ensemble is the function of one model under ``jax.vmap`` over its keys. A sweep calls
one compiled plan with key after key, as a search over seeds does: the last calls must
take no longer than the first, and the process must not grow.
"""

from __future__ import annotations

import os
import statistics
import time
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

if TYPE_CHECKING:
    from jax import Array
    from jax.sharding import NamedSharding

_MEMBERS = 16
_CALLS = 500
_WARM = 20  # the first calls fill caches


def _ensemble(layers: int) -> Any:
    """``key -> `` the parameters of 16 models of `layers` layers, stacked."""
    import jax

    one = subjects.narrow(layers)

    def init(key: Array) -> Any:
        return jax.vmap(one.fn)(jax.random.split(key, _MEMBERS))

    return init


def _places(fn: Any, devices: int) -> Any:
    """Members over the mesh."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    mesh = subjects.mesh(devices)

    def place(leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(mesh.axis_names))

    return jax.tree.map(place, jax.eval_shape(fn, jax.random.key(0)))


def ensemble(layers: int, devices: int) -> Figures:
    """``shardinit.init`` of the ensemble: trace to last byte."""
    import jax

    from shardinit.core.run.init import init

    fn = _ensemble(layers)
    places = _places(fn, devices)
    # The shapes were traced above, and JAX keeps the trace of a function.
    jax.clear_caches()
    return {"seconds": timed(init, fn, 1, out_shardings=places)[0]}


def ensemble_jit(layers: int, devices: int) -> Figures:
    """``jax.jit(init, out_shardings)`` of the ensemble."""
    import jax

    fn = _ensemble(layers)
    places = _places(fn, devices)
    jax.clear_caches()
    return {"seconds": timed(jax.jit(fn, out_shardings=places), jax.random.key(1))[0]}


def sweep(calls: int, devices: int) -> Figures:
    """One compiled plan, called again and again."""
    import jax

    from shardinit.core.plan.planning import plan as make_plan
    from shardinit.core.run.compile import compile_plan

    mesh = subjects.mesh(devices)
    compiled = compile_plan(
        make_plan(subjects.narrow(4), mesh=mesh, rules=subjects.rules())
    )
    seconds, held = [], []
    for number in range(calls):
        begin = time.perf_counter()
        jax.block_until_ready(compiled(number))
        seconds.append(time.perf_counter() - begin)
        held.append(_resident())
    first, last = seconds[_WARM : 2 * _WARM], seconds[-_WARM:]
    return {
        "seconds": statistics.median(last),
        "first_seconds": statistics.median(first),
        "growth_bytes": max(float(held[-1] - held[_WARM]), 1.0),
        "held_bytes": float(held[_WARM]),
    }


def _resident() -> int:
    from shardinit.bench.server import memory

    return memory(os.getpid(), "VmRSS")


def rows(bench: Bench) -> Iterator[Row]:
    """The ensemble against jit, and the sweep against its own first calls."""
    quick, devices = bench.options.quick, bench.options.devices
    sizes = {"layers": 1 if quick else 16, "devices": devices}
    jobs = Job("shardinit", sizes), Job("jit", sizes)
    mine, theirs = bench.measure(CASE, *jobs)
    name = f"an ensemble of {_MEMBERS} under vmap, cold"
    yield CASE.compare(bench, name, mine, theirs, "jit", target="ensemble")
    calls = 3 * _WARM if quick else _CALLS
    (runs,) = bench.measure(CASE, Job("sweep", {"calls": calls, "devices": devices}))
    last, first = sample(runs, "seconds"), sample(runs, "first_seconds")
    yield CASE.row(
        bench,
        f"call {calls} of a compiled plan over call {_WARM}",
        last / first,
        last,
        baseline=first,
        against="the first calls",
        target="sweep",
        note=f"the process grew by {median(runs, 'growth_bytes', 1e-6):.1f} of "
        f"{median(runs, 'held_bytes', 1e-6):.0f} MB meanwhile",
    )


CASE = register(
    name="many",
    measures="an ensemble in one function; a sweep of calls of one plan",
    baseline="jit; the first calls",
    sides={"shardinit": ensemble, "jit": ensemble_jit, "sweep": sweep},
    rows=rows,
    targets={
        "ensemble": Target(1.0, 2.0),
        "sweep": Target(1.1, 1.0, higher=False),
    },
)
