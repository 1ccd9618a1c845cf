"""``shardinit inspect`` and ``plan --html``: weights looked at before they exist."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from shardinit.cli import arguments, devices, options
from shardinit.cli.programs import AsJson, ModelName, Modules, Source
from shardinit.cli.targets import writing
from shardinit.files import write_file

if TYPE_CHECKING:
    from shardinit.core.plan.plan import Plan
    from shardinit.core.prng.root_key import KeyLike

MemoryLimit = Annotated[
    str,
    typer.Option(help="What a leaf may take that has to be made whole, such as 1GiB."),
]


def inspect(
    source: Source,
    seed: options.Seed = 0,
    select: options.Select = None,
    memory_limit: MemoryLimit = "64MiB",
    model: ModelName = "decoder",
    models: Modules = None,
    as_json: AsJson = False,
) -> None:
    """Shows statistics of every leaf, from windows; makes no large leaf."""
    devices.on_cpu()
    from shardinit.cli import tables
    from shardinit.verify.inspect.inspect import inspect as look

    limit = arguments.parse_bytes(memory_limit, "--memory-limit")
    fn = arguments.read_source(source, model, models)
    found = look(fn, seed, select=select or None, memory_limit=limit)
    if as_json:
        print(found.to_json())
    else:
        tables.print_inspection(found)


def write_page(plan: Plan, file: str, seed: KeyLike | None) -> None:
    """Writes a plan as one page of HTML.

    Args:
      plan: what is shown.
      file: where to; replaced if it is there.
      seed: of the statistics; None for none.
    """
    from shardinit.cli.page.page import page
    from shardinit.verify.inspect.inspect import inspect as look

    found = None
    if seed is not None:
        found = look(plan, seed, select=[x.path for x in plan.leaves if x.selected])
    with writing(file):
        write_file(file, page(plan, found).encode())
    print(f"{file}: {plan.summary()}")
