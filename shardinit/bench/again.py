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

from shardinit.bench import subjects
from shardinit.bench.case import (
    Bench,
    Figures,
    Job,
    Row,
    Target,
    median,
    register,
    timed,
)


def _compile(layers: int, devices: int, folder: str) -> Figures:
    import jax

    from shardinit.core.plan.planning import plan as make_plan
    from shardinit.core.run.compile import compile_plan

    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    mesh, rules = subjects.mesh(devices), subjects.rules()
    plan = make_plan(subjects.narrow(layers), mesh=mesh, rules=rules)
    seconds, compiled = timed(compile_plan, plan)
    return {"seconds": seconds, "programs": len(compiled.executables)}


def first(layers: int, devices: int, folder: str) -> Figures:
    """``compile_plan`` with an empty cache."""
    shutil.rmtree(folder, ignore_errors=True)
    Path(folder).mkdir()
    return _compile(layers, devices, folder)


def second(layers: int, devices: int, folder: str) -> Figures:
    """The same in another process, with what the first left behind."""
    assert any(Path(folder).iterdir()), "the first process cached nothing"
    return _compile(layers, devices, folder)


def save(layers: int, devices: int, folder: str) -> Figures:
    """Writes a program and its executables, for the sides that start from them."""
    from shardinit.core.plan.planning import plan as make_plan
    from shardinit.core.program.program import export_plan
    from shardinit.storage.executables import save_executables

    Path(folder).mkdir()
    program = export_plan(subjects.narrow(layers))
    program.save(Path(folder) / "program")
    mesh, rules = subjects.mesh(devices), subjects.rules()
    plan = make_plan(program, mesh=mesh, rules=rules)
    path = Path(folder) / "executables"
    (Path(folder) / "sha256").write_text(save_executables(plan, path))
    return {"bytes": path.stat().st_size}


def _start(devices: int, folder: str, with_executables: bool) -> Figures:
    from shardinit.core.plan.planning import plan as make_plan
    from shardinit.core.program.program import load_program
    from shardinit.core.run.compile import compile_plan
    from shardinit.storage.executables import load_executables

    mesh, rules = subjects.mesh(devices), subjects.rules()
    digest = (Path(folder) / "sha256").read_text()
    begin = time.perf_counter()
    program = load_program(Path(folder) / "program")
    plan = make_plan(program, mesh=mesh, rules=rules)
    if with_executables:
        path = Path(folder) / "executables"
        compiling, compiled = timed(load_executables, path, plan, sha256=digest)
    else:
        compiling, compiled = timed(compile_plan, plan)
    timed(compiled.leaves, 0)
    seconds = time.perf_counter() - begin
    return {"seconds": seconds, "compile": compiling, "programs": len(plan.programs)}


def from_program(layers: int, devices: int, folder: str) -> Figures:
    """From ``load_program`` to the last byte, compiling."""
    return _start(devices, folder, with_executables=False)


def from_executables(layers: int, devices: int, folder: str) -> Figures:
    """The same with the executables of another process."""
    return _start(devices, folder, with_executables=True)


def rows(bench: Bench) -> Iterator[Row]:
    """The second start over the first; from executables over from the program."""
    options = bench.options
    with tempfile.TemporaryDirectory() as home:
        sizes = {"layers": 2 if options.quick else 64, "devices": options.devices}
        cache = {**sizes, "folder": str(Path(home) / "cache")}
        files = {**sizes, "folder": str(Path(home) / "files")}
        cold, warm = bench.measure(CASE, Job("first", cache), Job("shardinit", cache))
        ((saved,),) = bench.measure(CASE, Job("save", files, 1))
        plain, loaded = bench.measure(
            CASE, Job("program", files), Job("executables", files)
        )
    yield CASE.compare(
        bench,
        "second process, persistent cache",
        warm,
        cold,
        "first process",
        over=True,
        target="ratio",
        note=f"compile_plan of {cold[0]['programs']:.0f} programs",
    )
    yield CASE.compare(
        bench,
        "second process, executables beside the program",
        loaded,
        plain,
        "the program alone",
        over=True,
        target="executables",
        note="from load_program to the last byte; of that "
        f"{median(loaded, 'compile'):.2f} s load_executables, "
        f"{median(plain, 'compile'):.2f} s compile_plan; {saved['bytes']:,.0f} bytes",
    )


CASE = register(
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
