"""``shardinit pin`` and ``shardinit diff``: did this change our initialisation?"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shardinit.cli import arguments, devices, options
from shardinit.cli.outcomes import DIFFERS, reading
from shardinit.cli.programs import AsJson, ModelName, Modules, Source
from shardinit.cli.targets import check_target, writing
from shardinit.errors import CheckpointError, ReceiptFormatError, ShardinitError
from shardinit.short import plural

if TYPE_CHECKING:
    from shardinit.verify.compare.snapshot import Snapshot

_TAKEN = (
    "A spec as other commands take it, module:function, a program, a receipt, a "
    "pin, or a checkpoint's folder."
)
First = Annotated[
    str,
    typer.Argument(help=_TAKEN, metavar="A", autocompletion=arguments.examples),
]
Second = Annotated[
    str | None,
    typer.Argument(
        help="Another of these, which came after.",
        metavar="B",
        autocompletion=arguments.examples,
    ),
]
Against = Annotated[
    str | None,
    typer.Option(help="A pin, a receipt or any other that A came after, in B's place."),
]
MeshText = Annotated[
    str | None, typer.Option(help="Axes and sizes: shardings are compared as well.")
]
RulesText = Annotated[
    str | None, typer.Option(help="Logical axes to mesh axes, beside --mesh.")
]


def pin(
    source: Source,
    file: Annotated[str, typer.Argument(help="The file to write.")],
    seed: options.Seed = 0,
    mesh: MeshText = None,
    rules: RulesText = None,
    values: Annotated[
        bool,
        typer.Option(help="Hash windows of the values, beside functions and keys."),
    ] = True,
    force: Annotated[bool, typer.Option(help="Replace a pin that differs.")] = False,
    model: ModelName = "decoder",
    models: Modules = None,
    as_json: AsJson = False,
) -> None:
    """Writes what an initialisation is, to hold later ones against."""
    check_target(file)
    devices.on_cpu()
    from shardinit.verify.compare.taking import snapshot

    fn = _placed(arguments.read_source(source, model, models), seed, mesh, rules)
    made = snapshot(fn, seed, values=values)
    if os.path.exists(file) and not force:
        if _read(file).to_json() == made.to_json():
            _said(file, made, False, as_json)
            return
        raise ShardinitError(
            f"FILE {file}",
            "it exists, and is not the pin of this model here",
            "a new file",
            f"shardinit diff {source} --against {file} says what differs; --force "
            "replaces it",
        )
    with writing(file):
        made.save(file, replace=True)
    _said(file, made, True, as_json)


def _said(file: str, made: Snapshot, written: bool, as_json: bool) -> None:
    facts = {"leaves": len(made.leaves), "fingerprint": made.fingerprint}
    if as_json:
        print(json.dumps({"file": file, **facts, "written": written}))
    elif written:
        leaves = plural(len(made.leaves), "leaf")
        print(f"{file}: {leaves}, fingerprint {made.fingerprint}")
    else:
        print(f"{file} is there already, and is the pin of this model")


def diff(
    first: First,
    second: Second = None,
    against: Against = None,
    seed: Annotated[
        Any,
        typer.Option(
            parser=arguments.parse_seed,
            metavar="SEED",
            help="Seed of functions, as for pin; default that of the pin, or 0.",
        ),
    ] = None,
    mesh: MeshText = None,
    rules: RulesText = None,
    values: Annotated[
        bool, typer.Option(help="Compare windows of values where a platform made both.")
    ] = True,
    model: ModelName = "decoder",
    models: Modules = None,
    as_json: AsJson = False,
) -> None:
    """Says what changed between two initialisations; exit code 3 if anything did.

    Exit code 4 if a pin, a receipt or a checkpoint cannot be read. Notes, such as a
    function that is written otherwise and gives the same values, are no difference.
    """
    if (second is None) == (against is None):
        raise typer.BadParameter("give two to compare, or one and --against FILE")
    before, after = (first, second) if against is None else (against, first)
    devices.on_cpu()
    from shardinit.cli.tables import print_lines
    from shardinit.verify.compare.diff import compare

    sides = _Sides(seed, mesh, rules, values, model, models)
    one, two = sides.read(str(before), str(after))
    found = compare(one, two)
    if as_json:
        print(found.to_json())
    else:
        print_lines(str(found))
    if not found.same:
        raise typer.Exit(DIFFERS)


def _placed(fn: Any, key: Any, mesh: str | None, rules: str | None) -> Any:
    """The function planned on a mesh without devices, where one is given."""
    if mesh is None:
        return fn
    from shardinit.core.plan.planning import plan

    on = arguments.abstract_mesh(arguments.parse_mesh(mesh))
    return plan(fn, key=key, mesh=on, rules=arguments.parse_rules(rules))


def _read(file: str) -> Snapshot:
    from shardinit.verify.compare.snapshot import Snapshot

    with reading():
        try:
            return Snapshot.from_json(Path(file).read_bytes())
        except ReceiptFormatError as error:
            error.relocate(f"pin {file!r}")
            raise


class _Sides:
    """Reads both sides: files first, since a pin says at which key functions are."""

    def __init__(
        self,
        seed: int | dict[str, int] | None,
        mesh: str | None,
        rules: str | None,
        values: bool,
        model: str,
        models: list[str] | None,
    ):
        self._seed, self._mesh, self._rules = seed, mesh, rules
        self._values, self._model, self._models = values, model, models

    def read(self, *sources: str) -> list[Snapshot]:
        """A snapshot of each."""
        from shardinit.verify.compare.snapshot import Snapshot

        kinds = [_kind(source) for source in sources]
        # A receipt has digests of whole leaves only.
        full = "receipt" in kinds
        files = [
            self._file(kind, source, full)
            for kind, source in zip(kinds, sources, strict=True)
        ]
        known = [side for side in files if isinstance(side, Snapshot)]
        return [
            self._function(source, known) if side is None else side
            for source, side in zip(sources, files, strict=True)
        ]

    def _file(self, kind: str, source: str, full: bool) -> Snapshot | None:
        from shardinit.verify.compare import taking

        if kind == "pin":
            return _read(source)
        if kind == "receipt":
            from shardinit.verify.receipt_record import Receipt

            with reading():
                return taking.of_receipt(Receipt.load(source))
        if kind != "folder":
            return None
        from shardinit.cli.folders import digest_folder

        with reading():
            if full:
                return taking.of_digest(digest_folder(source), source)
            return taking.of_arrays(_arrays(source), source)

    def _function(self, source: str, known: list[Snapshot]) -> Snapshot:
        from shardinit.verify.compare.taking import made_by, snapshot

        fn = arguments.read_source(source, self._model, self._models)
        key, values = (
            (0 if self._seed is None else self._seed),
            self._values and bool(known),
        )
        if known and known[0].key is not None and self._seed is None:
            key = _key(known[0])
        if known and known[0].made_by and known[0].made_by != made_by():
            values = False
        fn = _placed(fn, key, self._mesh, self._rules)
        return snapshot(fn, key, values=values and _has_windows(known))


def _has_windows(known: list[Snapshot]) -> bool:
    return any("windows" in leaf.values for side in known for leaf in side.leaves)


def _key(pinned: Snapshot) -> Any:
    """The key of a pin, as it was given."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    words = jnp.asarray(np.array(pinned.key, np.uint32))
    with reading():
        try:
            return jax.random.wrap_key_data(words, impl=pinned.impl)
        except (TypeError, ValueError) as error:
            raise ShardinitError("pin", f"no key of {pinned.impl} ({error})") from error


def _kind(source: str) -> str:
    """What a side is, by what lies there."""
    if os.path.isdir(source):
        return "folder"
    if not os.path.isfile(source):
        return "function"
    try:
        data = json.loads(Path(source).read_bytes())
    # `json.loads` recurses: brackets inside brackets may be too deep for it.
    except (ValueError, OSError, RecursionError):
        return "function"
    found = data.get("format") if isinstance(data, dict) else None
    if isinstance(found, str) and found.startswith("shardinit-pin"):
        return "pin"
    return "receipt" if isinstance(data, dict) and "algorithm" in data else "function"


def _arrays(folder: str) -> dict[str, Any]:
    """The arrays of a checkpoint of either format, by path."""
    from shardinit.core.paths import named_leaves
    from shardinit.storage.layout import INDEX, SINGLE

    if any(os.path.exists(os.path.join(folder, name)) for name in (INDEX, SINGLE)):
        from shardinit.storage import safetensors

        return safetensors.open(folder)
    if not os.listdir(folder):
        raise CheckpointError(f"checkpoint {folder!r}", "the folder is empty")
    from shardinit.cli.folders import quiet_orbax

    return dict(named_leaves(quiet_orbax().restore(folder)))
