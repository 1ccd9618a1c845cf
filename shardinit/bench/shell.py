"""The shell: how long a command takes from the prompt to its last line.

A command that only looks should answer while one still looks at it. Most of what it
takes is the import of JAX, which is the other side here.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator

from shardinit.bench.case import Bench, Figures, Job, Row, Target, register, sample


def _time(*arguments: str) -> Figures:
    """Seconds of a Python process; JAX in it looks for no devices but the CPU."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return {"seconds": time.perf_counter() - begin}


def plan(model: str) -> Figures:
    """``shardinit plan MODEL`` on a mesh of 64."""
    return _time("-m", "shardinit", "plan", model, "--mesh", "data=8,model=8")


def own_import() -> Figures:
    """``import shardinit``, and JAX."""
    return _time("-c", "import jax, shardinit; shardinit.init")


def jax_import() -> Figures:
    """``import jax`` alone."""
    return _time("-c", "import jax")


def rows(bench: Bench) -> Iterator[Row]:
    """The time of a plan, and of the import over JAX's."""
    model = "gpt2" if bench.options.quick else "llama-3.1-405b"
    jobs = Job("shardinit", {"model": model}), Job("import", {}), Job("jax", {})
    planned, ours, alone = bench.measure(CASE, *jobs)
    seconds = sample(planned, "seconds")
    name = f"shardinit plan {model}, at the shell"
    yield CASE.row(bench, name, seconds.median, seconds, unit="s", target="plan")
    mine, other = sample(ours, "seconds"), sample(alone, "seconds")
    yield CASE.row(
        bench,
        "import of shardinit, over JAX's own",
        max(mine.median - other.median, 0.0),
        mine,
        unit="s",
        target="import",
        baseline=other,
        against="import jax",
    )


CASE = register(
    name="shell",
    measures="a command from the prompt to its last line, and the import",
    baseline="importing JAX",
    sides={"shardinit": plan, "import": own_import, "jax": jax_import},
    rows=rows,
    targets={
        "plan": Target(3, 2, higher=False),
        "import": Target(0.3, 0.1, higher=False),
    },
)
