"""Checkpoints on the command line: write one, digest one, hold one against a receipt.

A checkpoint is written with its receipt beside it, ``NAME.receipt.json``: safetensors
by windows, so that the model may be larger than memory; Orbax from sharded arrays. The
same command again holds what is there against its receipt and ends well.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from shardinit import storage
from shardinit.cli import arguments, devices, options
from shardinit.cli.folders import Naming, digest_folder, quiet_orbax
from shardinit.cli.outcomes import UsageError, interruptible, reading
from shardinit.cli.programs import AsJson, ModelName, Modules, Source
from shardinit.cli.targets import check_target
from shardinit.errors import CheckpointError, ReceiptMismatchError
from shardinit.progress import counted, progress

if TYPE_CHECKING:
    from shardinit.core.plan.plan import Plan
    from shardinit.core.prng.root_key import KeyLike

Folder = Annotated[str, typer.Argument(help="A checkpoint's folder, of either format.")]
Names = Annotated[
    str | None,
    typer.Option(
        help="safetensors: tensors as another tool names and shapes them: hf for what "
        "transformers reads, or a file of `leaf -> tensor : transpose ...` lines."
    ),
]
Config = Annotated[
    str | None,
    typer.Option(help="--names hf: the model's config.json; default the model's own."),
]


def init(
    source: Source,
    out: Annotated[str, typer.Option("--out", "-o", help="The checkpoint's folder.")],
    layout: Annotated[
        Literal["orbax", "safetensors"],
        typer.Option("--format", help="safetensors is written by windows."),
    ] = "safetensors",
    seed: options.Seed = 0,
    mesh: Annotated[
        str | None,
        typer.Option(help="orbax: axes and sizes, such as data=2,model=4."),
    ] = None,
    rules: Annotated[
        str | None, typer.Option(help="orbax: logical axes to mesh axes.")
    ] = None,
    max_memory: Annotated[
        str | None,
        typer.Option(help="safetensors: bytes of windows in memory; default 1GiB."),
    ] = None,
    max_shard_size: Annotated[
        str | None, typer.Option(help="safetensors: bytes of a file; default 5GB.")
    ] = None,
    distributed: Annotated[
        str | None,
        typer.Option(
            help="orbax: one process of a job on several hosts: auto where JAX knows "
            "the cluster, else HOST:PORT,PROCESSES,THIS, such as host0:8476,4,0."
        ),
    ] = None,
    names: Names = None,
    config: Config = None,
    executables: Annotated[
        str | None,
        typer.Option(
            help="orbax: a file that compile wrote; machine code, so only"
            " from whom you would let install software."
        ),
    ] = None,
    executables_sha256: Annotated[
        str | None, typer.Option(help="orbax: its SHA-256, as its maker told you.")
    ] = None,
    draw_dtype: options.DrawDtype = None,
    opt_rules: options.OptRules = None,
    opt_memory: options.OptMemory = None,
    opt_state: options.OptState = None,
    model: ModelName = "decoder",
    models: Modules = None,
    as_json: AsJson = False,
) -> None:
    """Initialises a model into a checkpoint, with its receipt beside it."""
    windowed = {
        "--max-memory": max_memory,
        "--max-shard-size": max_shard_size,
        "--names": names,
        "--config": config,
    }
    sharded = {
        "--mesh": mesh,
        "--rules": rules,
        "--distributed": distributed,
        "--executables": executables,
        "--executables-sha256": executables_sha256,
        "--opt-rules": opt_rules,
        "--opt-memory": opt_memory,
        "--opt-state": opt_state,
    }
    for option, value in (sharded if layout == "safetensors" else windowed).items():
        if value is not None:
            other = "orbax" if layout == "safetensors" else "safetensors"
            raise UsageError(
                option, f"it means nothing with --format {layout}", f"--format {other}"
            )
    if (executables is None) != (executables_sha256 is None):
        raise UsageError(
            "--executables and --executables-sha256", "one was given", "both or neither"
        )
    target = check_target(out, folder=True)
    beside = target.with_name(target.name + ".receipt.json")
    axes = None if mesh is None else arguments.parse_mesh(mesh)
    if distributed is not None:
        devices.join(distributed, axes)
    elif axes is not None:
        devices.simulate_where_asked(axes)
    fn, spec = arguments.read_model(source, model, models)
    own = None if spec is None else spec.config.get("config", spec.config)
    naming = Naming(names, config or own)
    from shardinit.core.plan.planning import plan as make_plan

    if layout == "safetensors":
        plan = make_plan(fn, key=seed, draw_dtype=draw_dtype)
    else:
        placing = options.placing_of(rules, opt_rules, opt_memory, opt_state)
        on = devices.real_mesh(axes or devices.one_axis())
        plan = make_plan(fn, key=seed, mesh=on, draw_dtype=draw_dtype, **placing)
    new = not _has_format(target, layout)
    root = _held(plan, seed, target, beside, layout, naming)
    if root is None and layout == "safetensors":
        sizes = (max_memory, max_shard_size)
        kept = f"What is written is kept in {target}.unfinished"
        with interruptible(f"{kept}; the same command again goes on from there"):
            root = _write_windows(plan, seed, target, beside, naming, *sizes)
    elif root is None:
        if not _has_format(target, layout):
            storage.orbax.check_free(target)
        code = (executables, executables_sha256)
        kept = f"The same command again makes {target} anew, or verifies it if complete"
        with interruptible(kept):
            root = _write_arrays(plan, seed, target, beside, *code)
    if not devices.is_first():
        return
    if as_json:
        facts = {"checkpoint": str(target), "receipt": str(beside), "root": root}
        print(json.dumps({**facts, "written": new}))
        return
    said = f"wrote {target}" if new else f"{target} is there already, and verified"
    print(f"{said}\nreceipt {beside}\nroot {root}")


def digest(
    folder: Folder,
    as_json: AsJson = False,
) -> None:
    """Digests a checkpoint: every leaf, and the root."""
    devices.on_cpu()
    with reading():
        found = digest_folder(folder)
    if as_json:
        print(json.dumps({"root": found.root, "leaves": found.leaves}, indent=1))
        return
    for path, value in found.leaves.items():
        print(f"{value}  {path}")
    print(f"{found.root}  root")


def verify(
    receipt: Annotated[str, typer.Argument(help="A receipt, as init wrote it.")],
    folder: Folder,
    names: Names = None,
    as_json: AsJson = False,
) -> None:
    """Checks that a checkpoint holds the weights of a receipt; exit code 3 if not.

    Exit code 4 if the receipt or the checkpoint cannot be read.
    """
    devices.on_cpu()
    from shardinit.verify.receipt import Receipt, verify_receipt

    with reading():
        wanted = Receipt.load(receipt)
        shapes = {leaf.path: leaf.shape for leaf in wanted.leaves}
        there = Naming(names).digest(folder, shapes)
    try:
        found = verify_receipt(wanted, there)
    except ReceiptMismatchError as error:
        differences = list(map(str, error.differences))
        said = json.dumps({"ok": False, "differences": differences}, indent=1)
        print(said if as_json else "\n".join(differences))
        raise
    if as_json:
        print(json.dumps({"ok": True, "differences": [], "root": found.root}, indent=1))
        return
    print(f"{len(found.leaves)} leaves are those of {wanted.name}, root {found.root}")


def _held(
    plan: Plan, seed: KeyLike, target: Path, beside: Path, layout: str, naming: Naming
) -> str | None:
    """The root of a checkpoint that is there with its receipt, verified.

    None where there is no receipt, or one of the same whose checkpoint is still to be
    written: whoever writes finds out what else is there.

    Raises:
      CheckpointError: what is there is something else.
    """
    if not os.path.lexists(beside):
        return None
    from shardinit.core.prng.root_key import as_key
    from shardinit.core.run.arguments import key_words
    from shardinit.verify.receipt import Receipt, verify_receipt

    found = Receipt.load(beside)
    words = tuple(map(int, key_words(as_key(seed), plan.cut)))
    if (found.fingerprint, found.key) != (plan.fingerprint, words):
        what = "model" if found.key == words else "seed"
        raise CheckpointError.taken("receipt", beside, f"it is of another {what}")
    if not os.path.lexists(target):
        return None
    if not _has_format(target, layout):
        raise CheckpointError.taken("checkpoint", target, f"it is not {layout}")
    try:
        shapes = {leaf.path: tuple(leaf.shape) for leaf in plan.leaves}
        verify_receipt(found, naming.digest(target, shapes))
    except ReceiptMismatchError as error:
        why = f"its leaves are not those of its receipt ({error.differences[0]})"
        raise CheckpointError.taken("checkpoint", target, why) from error
    return found.root


def _has_format(target: Path, layout: str) -> bool:
    """Whether a folder holds a checkpoint of that format."""
    from shardinit.storage.layout import INDEX, SINGLE

    names = (INDEX, SINGLE) if layout == "safetensors" else ("_METADATA",)
    return any((target / name).exists() for name in names)


def _write_windows(
    plan: Plan,
    seed: KeyLike,
    target: Path,
    beside: Path,
    naming: Naming,
    max_memory: str | None,
    max_shard_size: str | None,
) -> str:
    """Writes safetensors and a receipt; the root of the digest."""
    from shardinit.core.run.lazy import open as open_lazily
    from shardinit.storage import safetensors
    from shardinit.verify.digest.devices import Digester
    from shardinit.verify.receipt import receipt as make_receipt

    memory = arguments.parse_bytes(max_memory or "1GiB", "--max-memory")
    shard = arguments.parse_bytes(max_shard_size or "5GB", "--max-shard-size")
    lazy = open_lazily(plan, seed, memory_limit=memory)
    digester = Digester({path: (x.shape, x.dtype) for path, x in lazy.items()})
    with progress("write") as report:
        advance = counted(report, lazy.nbytes)

        def on_window(path: str, start: tuple[int, ...], window: Any) -> None:
            if naming.names is None:
                digester.add(path, start, window)
            advance(window.nbytes)

        def before_publish() -> None:
            if naming.names is None:
                make_receipt(plan, seed, digester.digest()).save(beside, replace=True)

        safetensors.write(
            target,
            lazy,
            max_memory=memory,
            max_shard_size=shard,
            names=naming.names,
            config=naming.config,
            on_window=on_window,
            before_publish=before_publish,
        )
    if naming.names is None:
        return digester.digest().root
    # Windows were those of tensors: the leaves are read back, as another tool will.
    shapes = {path: tuple(x.shape) for path, x in lazy.items()}
    made = make_receipt(plan, seed, naming.digest(target, shapes))
    made.save(beside, replace=True)
    return made.root


def _write_arrays(
    plan: Plan,
    seed: KeyLike,
    target: Path,
    beside: Path,
    executables: str | None,
    sha256: str | None,
) -> str:
    """Writes an Orbax folder and a receipt; the root of the digest."""
    from shardinit.core.run.compile import compile_plan
    from shardinit.storage.executables import load_executables
    from shardinit.verify.receipt import receipt as make_receipt

    if executables is None or sha256 is None:
        compiled = compile_plan(plan)
    else:
        compiled = load_executables(executables, plan, sha256=sha256)
    with progress("initialise", unit="leaves") as report:
        params = compiled(seed, progress=report)
    receipt = make_receipt(plan, seed, params)
    quiet_orbax().save(target, params)
    if devices.is_first():
        receipt.save(beside, replace=True)
    return receipt.root
