"""``shardinit export``, ``compile`` and ``read``: weights as a program, and as code."""

from __future__ import annotations

import io
import json
import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shardinit.cli import arguments, devices, options
from shardinit.cli.outcomes import UsageError
from shardinit.cli.targets import check_target, writing
from shardinit.errors import ProgramFormatError, ShardinitError
from shardinit.files import write_file
from shardinit.short import plural

if TYPE_CHECKING:
    import numpy as np

Source = Annotated[
    str,
    typer.Argument(
        help="The name of an example such as gpt2, a config.json, a program file, JSON "
        "itself, module:function, or - for the content of a file on standard input.",
        autocompletion=arguments.examples,
    ),
]
ModelName = Annotated[
    str, typer.Option("--model", help="Name of the registered model to configure.")
]
Modules = Annotated[
    list[str] | None,
    typer.Option("--models", help="Module that registers models; may be repeated."),
]

AsJson = Annotated[bool, typer.Option("--json", help="As JSON.")]
WindowIndex = Annotated[
    str, typer.Argument(help="A numpy index, such as '0:4,::2' or '...,-1'.")
]
WindowFile = Annotated[
    str | None, typer.Option("--out", "-o", help="Write the window as a .npy file.")
]


def export(
    source: Source,
    out: Annotated[str, typer.Option("--out", "-o", help="The program file to write.")],
    draw_dtype: options.DrawDtype = None,
    opt_state: options.OptState = None,
    seed: options.Seed = 0,
    model: ModelName = "decoder",
    models: Modules = None,
    force: Annotated[bool, typer.Option(help="Replace a file that is there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Writes a model's initial weights as one small program."""
    check_target(out)
    devices.on_cpu()
    from shardinit.core.plan.planning import plan as make_plan
    from shardinit.core.program.program import export_plan, load_program

    there = None
    if os.path.exists(out) and not force:
        try:
            there = load_program(out)
        except (ProgramFormatError, OSError) as error:
            raise _exists(out) from error
    fn = arguments.read_source(source, model, models)
    told = {"draw_dtype": draw_dtype, "opt_state": opt_state}
    program = export_plan(make_plan(fn, key=seed, **told))
    if there is None:
        with writing(out):
            program.save(out, replace=True)
    elif there.fingerprint != program.fingerprint:
        raise _exists(out)
    else:
        if not as_json:
            print(f"{out} is there already, and is the program of this model")
        program = there
    size = os.path.getsize(out)
    if as_json:
        facts = {"out": out, "bytes": size, "leaves": len(program.paths)}
        names = {"fingerprint": program.fingerprint, "sha256": program.sha256}
        print(json.dumps({**facts, **names, "written": program is not there}))
        return
    print(
        f"{out}: {plural(len(program.paths), 'leaf')}, {size:,} bytes, "
        f"fingerprint {program.fingerprint}, sha256 {program.sha256}"
    )


def _exists(out: str) -> ShardinitError:
    return ShardinitError(
        f"--out {out}",
        "it exists, and is not the program of this model",
        "a new file",
        "Pass --force to replace it",
    )


def compile_for_here(
    source: Source,
    out: Annotated[str, typer.Option("--out", "-o", help="The file to write.")],
    mesh: Annotated[
        str, typer.Option(help="Axes and sizes, such as data=2,model=4.")
    ] = "device=1",
    rules: options.Rules = None,
    select: options.Select = None,
    strict: options.Strict = None,
    indivisible: options.Indivisible = "error",
    memory_limit: options.MemoryLimit = None,
    prng: options.Prng = None,
    draw_dtype: options.DrawDtype = None,
    opt_rules: options.OptRules = None,
    opt_memory: options.OptMemory = None,
    opt_state: options.OptState = None,
    seed: options.Seed = 0,
    model: ModelName = "decoder",
    models: Modules = None,
    as_json: AsJson = False,
) -> None:
    """Writes executables for init --executables, on a machine just like this one."""
    check_target(out)
    axes = arguments.parse_mesh(mesh)
    devices.simulate_where_asked(axes)
    from shardinit.storage.executables import save_executables

    fn = arguments.read_source(source, model, models)
    state = (opt_rules, opt_memory, opt_state)
    given = (rules, select, strict, indivisible, memory_limit, prng, draw_dtype)
    asked = options.Asked(*given, state, seed)
    plan = options.planned(fn, devices.real_mesh(axes), asked)
    with writing(out):
        digest = save_executables(plan, out)
    size, count = os.path.getsize(out), len(plan.programs)
    if as_json:
        facts = {"out": out, "bytes": size, "programs": count, "sha256": digest}
        print(json.dumps(facts))
        return
    print(f"{out}: {plural(count, 'program')}, {size:,} bytes")
    print(f"sha256 {digest}")


def read(
    source: Source,
    path: Annotated[
        str | None, typer.Argument(help="The leaf's path; none lists all.")
    ] = None,
    window: WindowIndex = "...",
    seed: options.Seed = 0,
    out: WindowFile = None,
    limit: Annotated[
        int, typer.Option(help="Bytes that a leaf may take that must be made whole.")
    ] = 1 << 32,
    model: ModelName = "decoder",
    models: Modules = None,
    as_json: AsJson = False,
) -> None:
    """Prints one window of one leaf, computed alone."""
    if out is not None:
        check_target(out)
    devices.on_cpu()
    import numpy as np

    from shardinit.core.run.lazy import open as open_lazily

    index = parse_window(window)
    fn = arguments.read_source(source, model, models)
    lazy = open_lazily(fn, seed, memory_limit=limit)
    if path is None:
        found = [(x.path, str(x.dtype), list(x.shape)) for x in lazy.values()]
        if as_json:
            names = ("path", "dtype", "shape")
            print(json.dumps([dict(zip(names, x, strict=True)) for x in found]))
            return
        for leaf in found:
            print("\t".join(map(str, leaf)))
        return
    try:
        values = np.asarray(lazy[path][index])
    except IndexError as error:
        raise ShardinitError("window", str(error)) from error
    show_window(values, path, window, out, as_json)


def show_window(
    values: np.ndarray, path: str, window: str, out: str | None, as_json: bool
) -> None:
    """Prints a window, or writes it into a file.

    Raises:
      ShardinitError: the file cannot be written, or another is there.
    """
    import numpy as np

    said = {"path": path, "dtype": str(values.dtype), "shape": values.shape}
    text = f"{path} [{window}] {values.dtype}{list(values.shape)}"
    if out is None and as_json:
        print(json.dumps({**said, "values": _numbers(values)}))
        return
    if out is None:
        print(f"{text}\n{np.array2string(values, threshold=200)}")
        return
    # numpy's format has no name for bfloat16 and the like: their bytes as ints.
    plain = values.dtype.kind in "biufc"
    width = f"u{values.dtype.itemsize}"
    made = io.BytesIO()
    np.save(made, values if plain else values.view(width), allow_pickle=False)
    try:
        with writing(out):
            write_file(out, made.getvalue(), replace=False)
    except ShardinitError as error:
        if not isinstance(error.__cause__, FileExistsError):
            raise
        raise ShardinitError(
            f"--out {out}",
            "it exists, and is not this window",
            "a new file",
            "Nothing is overwritten: remove it or choose another name",
        ) from error
    print(json.dumps({**said, "out": out}) if as_json else f"{out}: {text}")


def _numbers(values: np.ndarray) -> Any:
    """What JSON has of an array; a complex number is a pair."""
    import numpy as np

    if values.dtype.kind == "c":
        return np.stack([np.real(values), np.imag(values)], -1).tolist()
    narrow = values.dtype.kind not in "biuf"  # bfloat16 and the like
    return (values.astype(np.float32) if narrow else values).tolist()


def parse_window(text: str) -> tuple[Any, ...]:
    """``0:4,::2`` or ``...,-1`` as a numpy index of ints, slices and ``...``.

    Raises:
      UsageError: it does not read like that.
    """
    index: list[Any] = []
    for part in text.strip("[] ").split(","):
        pieces = [piece.strip() for piece in part.split(":")]
        try:
            if pieces == ["..."]:
                index.append(...)
            elif len(pieces) == 1:
                index.append(int(pieces[0]))
            elif len(pieces) <= 3:
                index.append(slice(*(int(p) if p else None for p in pieces)))
            else:
                raise ValueError
        except ValueError:
            raise UsageError(
                "window", f"{part.strip()!r} in {text!r}", "such as '0:4,::2' or '-1'"
            ) from None
        if isinstance(index[-1], slice) and index[-1].step == 0:
            raise UsageError("window", f"a step of 0 in {text!r}")
    return tuple(index)
