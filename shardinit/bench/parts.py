"""Parts of a model: one window, the missing half, and the whole as a small file.

What can be computed alone should cost what it is. A window is held against the leaf
evaluated whole and then sliced, completion against a full initialisation, and the
program of a model against the weights that it stands for.
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
    Row,
    Sample,
    Target,
    register,
    sample,
)

_SHAPE, _WINDOW = (16384, 53248), (2048, 6656)
_QUICK_SHAPE, _QUICK_WINDOW = (2048, 2048), (256, 256)
_WHOLE_BYTES = 6  # times the leaf: what evaluating it whole takes
_LAYERS, _QUICK_LAYERS = 64, 8


# ---- window ------------------------------------------------------------------------


def window(shape: list[int], window: list[int]) -> Figures:
    """``LazyArray.read`` of a window; the second one, at another place."""
    import jax

    from shardinit.core.plan.plan import plan as make_plan
    from shardinit.core.run.lazy import executable
    from shardinit.core.run.lazy import open as open_lazily

    fn = jax.nn.initializers.lecun_normal()
    lazy = open_lazily(lambda key: fn(key, tuple(shape)), 0)[""]
    lazy.read((0, 0), tuple(window))
    start = tuple(n - w for n, w in zip(shape, window, strict=True))
    begin = time.perf_counter()
    lazy.read(start, tuple(window))
    end = time.perf_counter()
    (program,) = make_plan(lambda key: fn(key, tuple(shape))).cut.programs
    run: Any = executable(program, (tuple(window),), jax.devices()[0])
    temporaries = run.memory_analysis().temp_size_in_bytes
    return {"seconds": end - begin, "temporary_bytes": temporaries}


def whole(shape: list[int], window: list[int]) -> Figures:
    """The leaf under ``jax.jit``, then the same slice of it; compiled before."""
    import jax
    import numpy as np

    fn = jax.nn.initializers.lecun_normal()
    key = jax.random.key(0)
    run: Any = jax.jit(lambda key: fn(key, tuple(shape))).lower(key).compile()
    at = tuple(slice(n - w, n) for n, w in zip(shape, window, strict=True))
    begin = time.perf_counter()
    np.array(np.asarray(run(key))[at])
    end = time.perf_counter()
    temporaries = run.memory_analysis().temp_size_in_bytes
    return {"seconds": end - begin, "temporary_bytes": temporaries}


def window_rows(bench: Bench) -> Iterator[Row]:
    """How many times faster than the whole leaf."""
    quick = bench.options.quick
    shape, part = (_QUICK_SHAPE, _QUICK_WINDOW) if quick else (_SHAPE, _WINDOW)
    parameters = {"shape": list(shape), "window": list(part)}
    needs = shape[0] * shape[1] * 4 * _WHOLE_BYTES
    ours, theirs = bench.measure(
        WINDOW,
        Job("shardinit", parameters, bench.options.repeats),
        Job("whole", parameters, bench.options.repeats, needs),
    )
    mine, other = sample(ours, "seconds"), sample(theirs, "seconds")
    yield Row(
        WINDOW.name,
        f"window {part[0]}x{part[1]} of {shape[0]}x{shape[1]}",
        other.median / mine.median,
        "x",
        mine,
        other,
        "whole leaf, then slice",
        target=None if quick else WINDOW.targets["ratio"],
        note=f"temporaries {ours[0]['temporary_bytes']:,.0f} bytes against "
        f"{theirs[0]['temporary_bytes']:,.0f}",
    )


# ---- completion --------------------------------------------------------------------


def _model(layers: int) -> Callable[[Any], Any]:
    import jax

    normal = jax.nn.initializers.normal(0.02)

    def init(key: Any) -> Any:
        return {
            f"layer_{i}": {
                "up": normal(jax.random.fold_in(key, 2 * i), (1024, 4096)),
                "down": normal(jax.random.fold_in(key, 2 * i + 1), (4096, 1024)),
            }
            for i in range(layers)
        }

    return init


def complete(layers: int, lacking: int) -> Figures:
    """``init_missing`` of a tree that lacks some of its layers; compiled before."""
    import jax

    from shardinit.bench import subjects
    from shardinit.core.run.compile import init
    from shardinit.core.run.missing import init_missing

    fn = _model(layers)
    mesh = subjects.mesh(8)
    tree = init(fn, 0, mesh=mesh)
    for number in range(lacking):
        del tree[f"layer_{number}"]
    begin = time.perf_counter()
    jax.block_until_ready(init_missing(tree, fn, 0, mesh=mesh))
    return {"seconds": time.perf_counter() - begin}


def missing_rows(bench: Bench) -> Iterator[Row]:
    """A sixteenth of the layers against all of them."""
    layers = _QUICK_LAYERS if bench.options.quick else _LAYERS
    few, many = bench.measure(
        MISSING,
        *(
            Job("shardinit", {"layers": layers, "lacking": n}, bench.options.repeats)
            for n in (max(layers // 16, 1), layers)
        ),
    )
    mine, other = sample(few, "seconds"), sample(many, "seconds")
    yield Row(
        MISSING.name,
        f"{max(layers // 16, 1)} of {layers} layers missing over all",
        mine.median / other.median,
        "x",
        mine,
        other,
        "all of them missing",
        note="trace, plan and compilation are in both",
    )


# ---- program -----------------------------------------------------------------------


def program(config: str) -> Figures:
    """``export_plan`` of an example's config."""
    from shardinit.core.plan.plan import plan as make_plan
    from shardinit.core.program.program import export_plan
    from shardinit.models import ModelSpec, build, example_config

    init_fn = build(ModelSpec("decoder", example_config(config)))
    plan = make_plan(init_fn)
    begin = time.perf_counter()
    size = len(export_plan(plan).to_bytes())
    end = time.perf_counter()
    return {
        "kilobytes": size / 1e3,
        "seconds": end - begin,
        "weights": 2 * plan.parameter_count,
    }


def program_rows(bench: Bench) -> Iterator[Row]:
    """The program's size, beside that of the weights in bfloat16."""
    name = "gpt2" if bench.options.quick else "llama-3.1-405b"
    (runs,) = bench.measure(PROGRAM, Job("shardinit", {"config": name}, 1))
    weights = Sample((runs[0]["weights"] / 1e3,))
    yield Row(
        PROGRAM.name,
        f"init program of {name}",
        runs[0]["kilobytes"],
        "KB",
        sample(runs, "kilobytes"),
        weights,
        "bfloat16 weights",
        side_unit="KB",
        target=None if bench.options.quick else PROGRAM.targets["kilobytes"],
        note=f"exported in {runs[0]['seconds']:.2f} s",
    )


WINDOW = register(
    Case(
        name="window",
        measures="one window of a large leaf, computed alone",
        baseline="the leaf under jax.jit, then slice",
        sides={"shardinit": window, "whole": whole},
        rows=window_rows,
        targets={"ratio": Target(100, 200)},
    )
)
MISSING = register(
    Case(
        name="missing",
        measures="completing a restored tree that lacks a few layers",
        baseline="itself with every layer missing",
        sides={"shardinit": complete},
        rows=missing_rows,
    )
)
PROGRAM = register(
    Case(
        name="program",
        measures="the init program of a large model",
        baseline="its weights",
        sides={"shardinit": program},
        rows=program_rows,
        targets={"kilobytes": Target(300, 100, higher=False)},
    )
)
