"""Keeping weights: the digest that attests them, the checkpoint that holds them.

A digest is held against the initialisation of the same arrays, in one process and in
turns: who attests what a job started from should not wait as long again. A checkpoint
is written by windows, so its peak memory is held against its bytes.
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

_LAYERS, _QUICK_LAYERS = 22, 1
_TINYLLAMA_BYTES = 5_500_000_000
_TURNS = 3
_LARGE, _SMALL = "llama-3.1-8b", "tinyllama-1.1b"
_LARGE_BYTES, _SMALL_BYTES = 16_060_522_496, 2_200_096_768
_ROOM = 1.2  # free bytes of the disk over those of the checkpoint


# ---- digest ------------------------------------------------------------------------


def digest(layers: int, devices: int) -> Figures:
    """``shardinit.digest`` of TinyLlama in float32 and its initialisation, in turns."""
    import jax

    from shardinit.bench import subjects
    from shardinit.core.plan.plan import plan as make_plan
    from shardinit.core.run.compile import compile_plan
    from shardinit.verify.digest.devices import digest as digest_params

    init_fn = subjects.tinyllama(layers)
    plan = make_plan(
        init_fn.fn, out_shardings=subjects.subject(init_fn, devices).shardings
    )
    compiled = compile_plan(plan)
    digest_params(compiled(0))  # compiles
    times: dict[str, list[float]] = {"init_seconds": [], "seconds": []}
    for seed in range(_TURNS):
        begin = time.perf_counter()
        params = jax.block_until_ready(compiled(seed))
        made = time.perf_counter()
        digest_params(params)
        times["seconds"].append(time.perf_counter() - made)
        times["init_seconds"].append(made - begin)
        del params
    figures = {name: min(values) for name, values in times.items()}
    return {**figures, "total_bytes": plan.total_bytes}


def digest_rows(bench: Bench) -> Iterator[Row]:
    """How many times faster than the initialisation."""
    quick = bench.options.quick
    layers = _QUICK_LAYERS if quick else _LAYERS
    parameters = {"layers": layers, "devices": bench.options.devices}
    needs = 0 if quick else _TINYLLAMA_BYTES
    (runs,) = bench.measure(
        DIGEST, Job("shardinit", parameters, bench.options.repeats, needs)
    )
    mine, init = sample(runs, "seconds"), sample(runs, "init_seconds")
    yield Row(
        DIGEST.name,
        f"digest of {runs[0]['total_bytes'] / 4e9:.2f}B float32 parameters",
        init.median / mine.median,
        "x",
        mine,
        init,
        "their initialisation",
        target=None if quick else DIGEST.targets["ratio"],
    )


# ---- checkpoint --------------------------------------------------------------------


def checkpoint(config: str, layers: int, max_memory: str) -> Figures:
    """``storage.safetensors.write`` of a model in bfloat16 that is nowhere whole."""
    from shardinit.core.run.lazy import open as open_lazily
    from shardinit.models import ModelSpec, build, example_config
    from shardinit.storage import safetensors

    settings = {**example_config(config), "param_dtype": "bfloat16"}
    if layers:
        settings["num_hidden_layers"] = layers
    lazy = open_lazily(build(ModelSpec("decoder", settings)).fn, 0)
    with tempfile.TemporaryDirectory(prefix="shardinit-bench-") as folder:
        begin = time.perf_counter()
        safetensors.write(Path(folder) / "out", lazy, max_memory=max_memory)
        seconds = time.perf_counter() - begin
    return {"seconds": seconds, "total_bytes": lazy.nbytes}


def checkpoint_rows(bench: Bench) -> Iterator[Row]:
    """How many times smaller the peak memory is than the checkpoint."""
    quick = bench.options.quick
    free = shutil.disk_usage(tempfile.gettempdir()).free
    large = free > _LARGE_BYTES * _ROOM and not quick
    config = _LARGE if large else _SMALL
    parameters = {
        "config": config,
        "layers": _QUICK_LAYERS if quick else 0,
        "max_memory": "256MiB",
    }
    (runs,) = bench.measure(CHECKPOINT, Job("shardinit", parameters, 1))
    size = runs[0]["total_bytes"]
    peak = sample(runs, "peak_bytes", 1e-9)
    seconds = sample(runs, "seconds").median
    yield Row(
        CHECKPOINT.name,
        f"safetensors of {config}, bytes over peak RSS",
        size / (peak.median * 1e9),
        "x",
        peak,
        None,
        "",
        side_unit="GB",
        target=None if quick else CHECKPOINT.targets[config],
        note=f"{size / 1e9:.1f} GB in {seconds:.0f} s; imports alone "
        f"{sample(runs, 'imports_bytes', 1e-9).median:.2f} GB",
    )


DIGEST = register(
    Case(
        name="digest",
        measures="digest of 1.1B float32 parameters where they lie",
        baseline="their initialisation",
        sides={"shardinit": digest},
        rows=digest_rows,
        targets={"ratio": Target(1, 4)},
    )
)

CHECKPOINT = register(
    Case(
        name="checkpoint",
        measures="safetensors by windows, an 8B model in bfloat16: peak memory",
        baseline="the checkpoint's bytes",
        sides={"shardinit": checkpoint},
        rows=checkpoint_rows,
        targets={
            _LARGE: Target(_LARGE_BYTES / 2e9, _LARGE_BYTES / 1e9),
            _SMALL: Target(_SMALL_BYTES / 6e8, _SMALL_BYTES / 4e8),
        },
    )
)
