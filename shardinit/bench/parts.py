"""Parts of a model: one window, the missing half, and the whole as a small file.

What can be computed alone should cost what it is. A window is held against the leaf
evaluated whole and then sliced, completion against a full initialisation, and the
program of a model against the weights that it stands for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from shardinit.bench import subjects
from shardinit.bench.case import (
    Bench,
    Figures,
    Job,
    Row,
    Sample,
    Target,
    register,
    timed,
)

if TYPE_CHECKING:
    import jax

_WHOLE_BYTES = 6  # times the leaf: what evaluating it whole takes

# ---- window ------------------------------------------------------------------------


def _leaf(shape: list[int]) -> Callable[[jax.Array], jax.Array]:
    import jax

    fn = jax.nn.initializers.lecun_normal()
    return lambda key: fn(key, tuple(shape))


def window(shape: list[int], window: list[int]) -> Figures:
    """``LazyArray.read`` of a window; the second one, at another place."""
    import jax

    from shardinit.core.plan.planning import plan as make_plan
    from shardinit.core.run.lazy import executable
    from shardinit.core.run.lazy import open as open_lazily

    fn, size = _leaf(shape), tuple(window)
    lazy = open_lazily(fn, 0)[""]
    lazy.read((0, 0), size)
    start = tuple(n - w for n, w in zip(shape, size, strict=True))
    seconds, _ = timed(lazy.read, start, size)
    (program,) = make_plan(fn).cut.programs
    run: Any = executable(program, (size,), jax.devices()[0])
    temporaries = run.memory_analysis().temp_size_in_bytes
    return {"seconds": seconds, "temporary_bytes": temporaries}


def whole(shape: list[int], window: list[int]) -> Figures:
    """The leaf under ``jax.jit``, then the same slice of it; compiled before."""
    import jax
    import numpy as np

    key = jax.random.key(0)
    run: Any = jax.jit(_leaf(shape)).lower(key).compile()
    at = tuple(slice(n - w, n) for n, w in zip(shape, window, strict=True))
    seconds, _ = timed(lambda: np.array(np.asarray(run(key))[at]))
    temporaries = run.memory_analysis().temp_size_in_bytes
    return {"seconds": seconds, "temporary_bytes": temporaries}


def window_rows(bench: Bench) -> Iterator[Row]:
    """How many times faster than the whole leaf."""
    shape, part = (16384, 53248), (2048, 6656)
    if bench.options.quick:
        shape, part = (2048, 2048), (256, 256)
    sizes = {"shape": list(shape), "window": list(part)}
    needs = shape[0] * shape[1] * 4 * _WHOLE_BYTES
    mine, theirs = bench.measure(
        WINDOW, Job("shardinit", sizes), Job("whole", sizes, needs_bytes=needs)
    )
    yield WINDOW.compare(
        bench,
        f"window {part[0]}x{part[1]} of {shape[0]}x{shape[1]}",
        mine,
        theirs,
        "whole leaf, then slice",
        target="ratio",
        note=f"temporaries {mine[0]['temporary_bytes']:,.0f} bytes against "
        f"{theirs[0]['temporary_bytes']:,.0f}",
    )


WINDOW = register(
    name="window",
    measures="one window of a large leaf, computed alone",
    baseline="the leaf under jax.jit, then slice",
    sides={"shardinit": window, "whole": whole},
    rows=window_rows,
    targets={"ratio": Target(100, 200)},
)

# ---- completion --------------------------------------------------------------------


def complete(layers: int, lacking: int) -> Figures:
    """``init_missing`` of a tree that lacks some of its layers; compiled before."""
    import jax

    from shardinit.core.run.init import init as init_sharded
    from shardinit.core.run.missing import init_missing

    normal = jax.nn.initializers.normal(0.02)

    def fn(key: jax.Array) -> dict[str, Any]:
        return {
            f"layer_{i}": {
                "up": normal(jax.random.fold_in(key, 2 * i), (1024, 4096)),
                "down": normal(jax.random.fold_in(key, 2 * i + 1), (4096, 1024)),
            }
            for i in range(layers)
        }

    mesh = subjects.mesh(8)
    tree = init_sharded(fn, 0, mesh=mesh)
    for number in range(lacking):
        del tree[f"layer_{number}"]
    seconds, _ = timed(init_missing, tree, fn, 0, mesh=mesh)
    return {"seconds": seconds}


def missing_rows(bench: Bench) -> Iterator[Row]:
    """A sixteenth of the layers against all of them."""
    layers = 8 if bench.options.quick else 64
    part = max(layers // 16, 1)
    sizes = [{"layers": layers, "lacking": n} for n in (part, layers)]
    few, many = bench.measure(MISSING, *(Job("shardinit", size) for size in sizes))
    yield MISSING.compare(
        bench,
        f"{part} of {layers} layers missing over all",
        few,
        many,
        "all of them missing",
        over=True,
        note="trace, plan and compilation are in both",
    )


MISSING = register(
    name="missing",
    measures="completing a restored tree that lacks a few layers",
    baseline="itself with every layer missing",
    sides={"shardinit": complete},
    rows=missing_rows,
)

# ---- program -----------------------------------------------------------------------


def program(config: str) -> Figures:
    """``export_plan`` of an example's config."""
    from shardinit.core.plan.planning import plan as make_plan
    from shardinit.core.program.program import export_plan

    plan = make_plan(subjects.example(config))
    seconds, data = timed(lambda: export_plan(plan).to_bytes())
    return {
        "kilobytes": len(data) / 1e3,
        "seconds": seconds,
        "weights": 2 * plan.parameter_count,
    }


def program_rows(bench: Bench) -> Iterator[Row]:
    """The program's size, beside that of the weights in bfloat16."""
    name = "gpt2" if bench.options.quick else "llama-3.1-405b"
    ((found,),) = bench.measure(PROGRAM, Job("shardinit", {"config": name}, 1))
    yield PROGRAM.row(
        bench,
        f"init program of {name}",
        found["kilobytes"],
        Sample((found["kilobytes"],)),
        baseline=Sample((found["weights"] / 1e3,)),
        against="bfloat16 weights",
        unit="KB",
        side_unit="KB",
        target="kilobytes",
        note=f"exported in {found['seconds']:.2f} s",
    )


PROGRAM = register(
    name="program",
    measures="the init program of a large model",
    baseline="its weights",
    sides={"shardinit": program},
    rows=program_rows,
    targets={"kilobytes": Target(300, 100, higher=False)},
)
