"""Keeping weights: the digest that attests them, the checkpoint that holds them.

A digest is held against the initialisation of the same arrays, in one process and in
turns: who attests what a job started from should not wait as long again. A checkpoint
is written by windows, so its peak memory is held against its bytes.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

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

_TINYLLAMA_BYTES = 5_500_000_000
_TURNS = 3
_LARGE, _SMALL = "llama-3.1-8b", "tinyllama-1.1b"
_LARGE_BYTES, _SMALL_BYTES = 16_060_522_496, 2_200_096_768
_ROOM = 1.2  # free bytes of the disk over those of the checkpoint


# ---- digest ------------------------------------------------------------------------


def digest(layers: int, devices: int) -> Figures:
    """``shardinit.digest`` of TinyLlama in float32 and its initialisation, in turns."""
    from shardinit.core.plan.planning import plan as make_plan
    from shardinit.core.run.compile import compile_plan
    from shardinit.verify.digest.devices import digest as digest_of

    init_fn = subjects.tinyllama(layers)
    subject = subjects.subject(init_fn, subjects.mesh(devices))
    plan = make_plan(init_fn.fn, out_shardings=subject.shardings)
    compiled = compile_plan(plan)
    digest_of(compiled(0))  # compiles
    making, digesting = [], []
    for seed in range(_TURNS):
        seconds, params = timed(compiled, seed)
        making.append(seconds)
        digesting.append(timed(digest_of, params)[0])
        del params
    return {
        "init_seconds": min(making),
        "seconds": min(digesting),
        "total_bytes": plan.total_bytes,
    }


def digest_rows(bench: Bench) -> Iterator[Row]:
    """How many times faster than the initialisation."""
    quick = bench.options.quick
    sizes = {"layers": 1 if quick else 22, "devices": bench.options.devices}
    needs = 0 if quick else _TINYLLAMA_BYTES
    (runs,) = bench.measure(DIGEST, Job("shardinit", sizes, needs_bytes=needs))
    ours, init = sample(runs, "seconds"), sample(runs, "init_seconds")
    name = f"digest of {runs[0]['total_bytes'] / 4e9:.2f}B float32 parameters"
    sides = {"baseline": init, "against": "their initialisation"}
    yield DIGEST.row(bench, name, init / ours, ours, target="ratio", **sides)


DIGEST = register(
    name="digest",
    measures="digest of 1.1B float32 parameters where they lie",
    baseline="their initialisation",
    sides={"shardinit": digest},
    rows=digest_rows,
    targets={"ratio": Target(1, 4)},
)

# ---- checkpoint --------------------------------------------------------------------


def checkpoint(config: str, layers: int, max_memory: str) -> Figures:
    """``storage.safetensors.write`` of a model in bfloat16 that is nowhere whole."""
    from shardinit.core.run.lazy import open as open_lazily
    from shardinit.storage import safetensors

    changed = {"num_hidden_layers": layers} if layers else {}
    init_fn = subjects.example(config, param_dtype="bfloat16", **changed)
    lazy = open_lazily(init_fn.fn, 0)
    with tempfile.TemporaryDirectory(prefix="shardinit-bench-") as folder:
        out = Path(folder) / "out"
        seconds, _ = timed(safetensors.write, out, lazy, max_memory=max_memory)
    return {"seconds": seconds, "total_bytes": lazy.nbytes}


def checkpoint_rows(bench: Bench) -> Iterator[Row]:
    """How many times smaller the peak memory is than the checkpoint."""
    quick = bench.options.quick
    free = shutil.disk_usage(tempfile.gettempdir()).free
    large = free > _LARGE_BYTES * _ROOM and not quick
    config = _LARGE if large else _SMALL
    sizes = {"config": config, "layers": 1 if quick else 0, "max_memory": "256MiB"}
    (runs,) = bench.measure(CHECKPOINT, Job("shardinit", sizes, 1))
    gigabytes = runs[0]["total_bytes"] / 1e9
    peak = sample(runs, "peak_bytes", 1e-9)
    yield CHECKPOINT.row(
        bench,
        f"safetensors of {config}, bytes over peak RSS",
        gigabytes / peak.median,
        peak,
        side_unit="GB",
        target=config,
        note=f"{gigabytes:.1f} GB in {median(runs, 'seconds'):.0f} s; imports alone "
        f"{median(runs, 'imports_bytes', 1e-9):.2f} GB",
    )


CHECKPOINT = register(
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
