"""Again: a job that starts a second time, and need not compile a second time.

Training jobs are restarted. With JAX's persistent compilation cache switched on, the
few programs of a model are read instead of compiled; and where the first process and
the second share no folder, a file of executables does the same.
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

    from shardinit.bench import subjects
    from shardinit.core.plan.plan import plan as make_plan
    from shardinit.core.run.compile import compile_plan

    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    mesh = subjects.mesh(devices)
    init_fn = subjects.narrow(layers)
    plan = make_plan(init_fn, mesh=mesh, rules=subjects.RULES)
    begin = time.perf_counter()
    exe = compile_plan(plan)
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


def _start(layers: int, devices: int, folder: str, with_executables: bool) -> Figures:
    import jax

    from shardinit.bench import subjects
    from shardinit.core.plan.plan import plan as make_plan
    from shardinit.core.program.program import load_program
    from shardinit.core.run.compile import compile_plan
    from shardinit.storage.executables import load_executables

    del layers  # the program has them
    mesh = subjects.mesh(devices)
    digest = (Path(folder) / "sha256").read_text()
    begin = time.perf_counter()
    program = load_program(Path(folder) / "program")
    plan = make_plan(program, mesh=mesh, rules=subjects.RULES)
    planned = time.perf_counter()
    if with_executables:
        path = Path(folder) / "executables"
        compiled = load_executables(path, plan, sha256=digest)
    else:
        compiled = compile_plan(plan)
    ready = time.perf_counter()
    jax.block_until_ready(compiled.leaves(0))
    return {
        "seconds": time.perf_counter() - begin,
        "compile": ready - planned,
        "programs": len(plan.programs),
    }


def save(layers: int, devices: int, folder: str) -> Figures:
    """Writes a program and its executables, for the sides that start from them."""
    from shardinit.bench import subjects
    from shardinit.core.plan.plan import plan as make_plan
    from shardinit.core.program.program import export_plan
    from shardinit.storage.executables import save_executables

    Path(folder).mkdir()
    program = export_plan(subjects.narrow(layers))
    program.save(Path(folder) / "program")
    mesh = subjects.mesh(devices)
    plan = make_plan(program, mesh=mesh, rules=subjects.RULES)
    path = Path(folder) / "executables"
    (Path(folder) / "sha256").write_text(save_executables(plan, path))
    return {"bytes": path.stat().st_size}


def from_program(layers: int, devices: int, folder: str) -> Figures:
    """From ``load_program`` to the last byte, compiling."""
    return _start(layers, devices, folder, with_executables=False)


def from_executables(layers: int, devices: int, folder: str) -> Figures:
    """The same with the executables of another process."""
    return _start(layers, devices, folder, with_executables=True)


def rows(bench: Bench) -> Iterator[Row]:
    """The second start over the first; from executables over from the program."""
    options = bench.options
    with tempfile.TemporaryDirectory() as home:
        parameters = {
            "layers": _QUICK_LAYERS if options.quick else _LAYERS,
            "devices": options.devices,
        }
        cache = {**parameters, "folder": str(Path(home) / "cache")}
        cold, warm = bench.measure(
            CASE,
            Job("first", cache, options.repeats),
            Job("shardinit", cache, options.repeats),
        )
        files = {**parameters, "folder": str(Path(home) / "files")}
        ((saved,),) = bench.measure(CASE, Job("save", files, 1))
        plain, loaded = bench.measure(
            CASE,
            Job("program", files, options.repeats),
            Job("executables", files, options.repeats),
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
    mine, other = sample(loaded, "seconds"), sample(plain, "seconds")
    compiling = [sample(side, "compile").median for side in (loaded, plain)]
    yield Row(
        CASE.name,
        "second process, executables beside the program",
        mine.median / other.median,
        "x",
        mine,
        other,
        "the program alone",
        target=None if options.quick else CASE.targets["executables"],
        note=f"from load_program to the last byte; of that {compiling[0]:.2f} s "
        f"load_executables, {compiling[1]:.2f} s compile_plan; "
        f"{saved['bytes']:,.0f} bytes",
    )


CASE = register(
    Case(
        name="again",
        measures="a second process, with the persistent cache or executables",
        baseline="the first process; the program alone",
        sides={
            "first": first,
            "shardinit": second,
            "save": save,
            "program": from_program,
            "executables": from_executables,
        },
        rows=rows,
        targets={
            "ratio": Target(0.4, 0.25, higher=False),
            "executables": Target(0.5, 0.25, higher=False),
        },
    )
)
