"""Again: a job that starts a second time, with JAX's persistent compilation cache.

Training jobs are restarted. With the cache switched on, the few programs of a model
are read instead of compiled.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

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

_LAYERS, _QUICK_LAYERS = 64, 2


def _compile(layers: int, devices: int, folder: str) -> Figures:
    import jax

    import shardinit
    from shardinit.bench import subjects

    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    mesh = subjects.mesh(devices)
    init_fn = subjects.narrow(layers)
    plan = shardinit.plan(init_fn, mesh=mesh, rules=subjects.RULES)
    begin = time.perf_counter()
    exe = shardinit.compile_plan(plan)
    return {
        "seconds": time.perf_counter() - begin,
        "programs": len(exe.executables),
    }


def first(layers: int, devices: int, folder: str) -> Figures:
    """``compile_plan`` with an empty cache."""
    shutil.rmtree(folder, ignore_errors=True)
    Path(folder).mkdir()
    return _compile(layers, devices, folder)


def second(layers: int, devices: int, folder: str) -> Figures:
    """The same in another process, with what the first left behind."""
    assert any(Path(folder).iterdir()), "the first process cached nothing"
    return _compile(layers, devices, folder)


def rows(bench: Bench) -> Iterator[Row]:
    """The second start over the first."""
    options = bench.options
    with tempfile.TemporaryDirectory() as home:
        parameters = {
            "layers": _QUICK_LAYERS if options.quick else _LAYERS,
            "devices": options.devices,
            "folder": str(Path(home) / "cache"),
        }
        cold, warm = bench.measure(
            CASE,
            Job("first", parameters, options.repeats),
            Job("shardinit", parameters, options.repeats),
        )
    mine, other = sample(warm, "seconds"), sample(cold, "seconds")
    yield Row(
        CASE.name,
        "second process, persistent cache",
        mine.median / other.median,
        "x",
        mine,
        other,
        "first process",
        target=None if options.quick else CASE.targets["ratio"],
        note=f"compile_plan of {cold[0]['programs']:.0f} programs",
    )


CASE = register(
    Case(
        name="again",
        measures="compiling in a second process, with the persistent cache",
        baseline="the first process",
        sides={"first": first, "shardinit": second},
        rows=rows,
        targets={"ratio": Target(0.4, 0.25, higher=False)},
    )
)
