"""Checkpoints on the command line: write one, digest one, hold one against a receipt.

A checkpoint is written with its receipt beside it, ``NAME.receipt.json``: safetensors
by windows, so that the model may be larger than memory; Orbax from sharded arrays. The
same command again holds what is there against its receipt and ends well.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import typer

from shardinit import storage
from shardinit.cli import arguments, devices, options
from shardinit.cli.folders import Naming, digest_folder, quiet_orbax
from shardinit.cli.outcomes import UsageError, interruptible, reading
from shardinit.cli.programs import AsJson, ModelName, Modules, Source
from shardinit.cli.targets import check_target
from shardinit.errors import CheckpointError, ReceiptMismatchError
from shardinit.progress import counted, progress
from shardinit.short import plural

if TYPE_CHECKING:
    from shardinit.core.plan.plan import Plan
    from shardinit.core.prng.root_key import KeyLike
    from shardinit.models import ModelSpec
    from shardinit.verify.digest.host import Digest

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
    _refuse_others({"orbax": sharded, "safetensors": windowed}, layout)
    if (executables is None) != (executables_sha256 is None):
        raise UsageError(
            "--executables and --executables-sha256", "one was given", "both or neither"
        )
    target = check_target(out, folder=True)
    axes = None if mesh is None else arguments.parse_mesh(mesh)
    if distributed is not None:
        devices.join(distributed, axes)
    elif axes is not None:
        devices.simulate_where_asked(axes)
    fn, spec = arguments.read_model(source, model, models)
    of_state = (opt_rules, opt_memory, opt_state)
    asked = options.Asked(
        rules, None, None, "error", None, None, draw_dtype, of_state, seed
    )
    on = None if layout == "safetensors" else devices.real_mesh(axes)
    naming = Naming(names, config or _config_of(spec))
    wanted = _Checkpoint(target, layout, options.planned(fn, on, asked), seed, naming)
    new, root = not wanted.is_there(), wanted.verified()
    if root is None and layout == "safetensors":
        root = wanted.write_windows(max_memory, max_shard_size)
    elif root is None:
        root = wanted.write_arrays(executables, executables_sha256)
    if devices.is_first():
        _report(wanted, root, new, as_json)


def _config_of(spec: ModelSpec | None) -> Any:
    """What a spec says of its model, as ``config.json`` has it."""
    return None if spec is None else spec.config.get("config", spec.config)


def _report(wanted: _Checkpoint, root: str, new: bool, as_json: bool) -> None:
    target, receipt = wanted.target, wanted.receipt
    if as_json:
        facts = {"checkpoint": str(target), "receipt": str(receipt), "root": root}
        print(json.dumps({**facts, "written": new}))
        return
    said = f"wrote {target}" if new else f"{target} is there already, and verified"
    print(f"{said}\nreceipt {receipt}\nroot {root}")


def _refuse_others(given: Mapping[str, Mapping[str, Any]], layout: str) -> None:
    """Refuses options of another format than the one that is written."""
    for other, options_of in given.items():
        typed = [name for name, value in options_of.items() if value is not None]
        if other != layout and typed:
            text = f"it means nothing with --format {layout}"
            raise UsageError(typed[0], text, f"--format {other}")


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
    leaves = plural(len(found.leaves), "leaf")
    print(f"{leaves} as in {wanted.name}, root {found.root}")


class _Checkpoint(NamedTuple):
    """A checkpoint that is asked for.

    Attributes:
      target: its folder.
      layout: its format.
      plan, seed: the weights.
      naming: how its tensors are named.
    """

    target: Path
    layout: str
    plan: Plan
    seed: KeyLike
    naming: Naming

    @property
    def receipt(self) -> Path:
        """Where its receipt is."""
        return self.target.with_name(self.target.name + ".receipt.json")

    def is_there(self) -> bool:
        """Whether the folder holds a checkpoint of that format."""
        from shardinit.storage.layout import INDEX, SINGLE

        names = (INDEX, SINGLE) if self.layout == "safetensors" else ("_METADATA",)
        return any((self.target / name).exists() for name in names)

    def verified(self) -> str | None:
        """The root of what is there with its receipt, when that has been verified.

        None where there is no receipt, or a receipt of the same weights and no folder:
        the checkpoint is then to be written, which refuses whatever else it finds.

        Raises:
          CheckpointError: what is there is something else.
        """
        target, beside = self.target, self.receipt
        if not os.path.lexists(beside):
            return None
        from shardinit.core.prng.root_key import as_key
        from shardinit.core.run.arguments import key_words
        from shardinit.verify.receipt import Receipt, verify_receipt

        found = Receipt.load(beside)
        words = tuple(map(int, key_words(as_key(self.seed), self.plan.cut)))
        if (found.fingerprint, found.key) != (self.plan.fingerprint, words):
            what = "model" if found.key == words else "seed"
            raise CheckpointError.taken("receipt", beside, f"it is of another {what}")
        if not os.path.lexists(target):
            return None
        if not self.is_there():
            why = f"it is not {self.layout}"
            raise CheckpointError.taken("checkpoint", target, why)
        try:
            shapes = {leaf.path: tuple(leaf.shape) for leaf in self.plan.leaves}
            verify_receipt(found, self.naming.digest(target, shapes))
        except ReceiptMismatchError as error:
            why = f"its leaves are not those of its receipt ({error.differences[0]})"
            raise CheckpointError.taken("checkpoint", target, why) from error
        return found.root

    def write_windows(self, max_memory: str | None, max_shard_size: str | None) -> str:
        """Writes safetensors and a receipt; the root of the digest."""
        memory = arguments.parse_bytes(max_memory or "1GiB", "--max-memory")
        shard = arguments.parse_bytes(max_shard_size or "5GB", "--max-shard-size")
        kept = f"What is written is kept in {self.target}.unfinished"
        with interruptible(f"{kept}; the same command again goes on from there"):
            return self._write_windows(memory, shard)

    def _write_windows(self, memory: int, shard: int) -> str:
        from shardinit.core.run.lazy import open as open_lazily
        from shardinit.storage import safetensors
        from shardinit.verify.digest.devices import Digester

        named = self.naming.names is not None
        lazy = open_lazily(self.plan, self.seed, memory_limit=memory)
        digester = Digester({path: (x.shape, x.dtype) for path, x in lazy.items()})
        with progress("write") as report:
            advance = counted(report, lazy.nbytes)

            def on_window(path: str, start: tuple[int, ...], window: Any) -> None:
                if not named:
                    digester.add(path, start, window)
                advance(window.nbytes)

            # The receipt first: of a command that ends in between there is a receipt
            # and no folder, which the next run takes for its own, and no folder that
            # nobody can verify.
            def before_publish() -> None:
                if not named:
                    self._sign(digester.digest())

            safetensors.write(
                self.target,
                lazy,
                max_memory=memory,
                max_shard_size=shard,
                names=self.naming.names,
                config=self.naming.config,
                on_window=on_window,
                before_publish=before_publish,
            )
        if not named:
            return digester.digest().root
        # Windows were those of tensors: the leaves are read back, as another tool will.
        shapes = {path: tuple(x.shape) for path, x in lazy.items()}
        return self._sign(self.naming.digest(self.target, shapes))

    def write_arrays(self, executables: str | None, sha256: str | None) -> str:
        """Writes an Orbax folder and a receipt; the root of the digest."""
        from shardinit.core.run.compile import compile_plan
        from shardinit.storage.executables import load_executables
        from shardinit.verify.receipt import receipt as make_receipt

        if not self.is_there():
            storage.orbax.check_free(self.target)
        kept = f"The same command again makes {self.target} anew, or verifies it if"
        with interruptible(f"{kept} complete"):
            if executables is None or sha256 is None:
                compiled = compile_plan(self.plan)
            else:
                compiled = load_executables(executables, self.plan, sha256=sha256)
            with progress("initialise", unit="leaves") as report:
                params = compiled(self.seed, progress=report)
            made = make_receipt(self.plan, self.seed, params)
            quiet_orbax().save(self.target, params)
            if devices.is_first():
                made.save(self.receipt, replace=True)
        return made.root

    def _sign(self, found: Digest) -> str:
        """Writes the receipt of a digest; the root of it."""
        from shardinit.verify.receipt import receipt as make_receipt

        made = make_receipt(self.plan, self.seed, found)
        made.save(self.receipt, replace=True)
        return made.root
