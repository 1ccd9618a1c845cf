"""``shardinit inspect``: what the weights will be like, before any is made."""

from __future__ import annotations

from typing import Annotated

import typer

from shardinit.cli import arguments, devices, options
from shardinit.cli.programs import AsJson, ModelName, Modules, Seed, Source

MemoryLimit = Annotated[
    str,
    typer.Option(help="What a leaf may take that has to be made whole, such as 1GiB."),
]


def inspect(
    source: Source,
    seed: Seed = 0,
    select: options.Select = None,
    memory_limit: MemoryLimit = "64MiB",
    model: ModelName = "decoder",
    models: Modules = None,
    as_json: AsJson = False,
) -> None:
    """Shows statistics of every leaf, from windows; makes no large leaf."""
    devices.on_cpu()
    from shardinit.cli import tables
    from shardinit.storage.layout import parse_size
    from shardinit.verify.inspect.inspect import inspect as look

    limit = parse_size(memory_limit, "--memory-limit")
    fn = arguments.read_source(source, model, models)
    found = look(fn, seed, select=select or None, memory_limit=limit)
    if as_json:
        print(found.to_json())
    else:
        tables.print_inspection(found)
