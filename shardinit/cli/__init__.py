"""The command line: plan a launch, serve models, see it all run once.

Every command is thin: it reads its arguments, calls what Python code would call, and
prints. Whatever goes wrong on purpose is one message on standard error; ``outcomes``
has the exit codes.

JAX reads its environment when it is first imported, so each command imports it only
once it has said which platform it wants.
"""

from __future__ import annotations

import io
import json
import sys
import warnings
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shardinit.cli import (
    arguments,
    changes,
    checkpoints,
    client,
    devices,
    looking,
    options,
    programs,
    serving,
    settings,
)
from shardinit.cli.group import Commands
from shardinit.cli.outcomes import (
    UsageError,
    end_with_code,
    interruptible,
    keep_interrupts,
)
from shardinit.cli.programs import AsJson, ModelName, Modules, Source
from shardinit.cli.targets import check_target
from shardinit.doctor import version_line
from shardinit.errors import FindingsWarning
from shardinit.progress import progress

if TYPE_CHECKING:
    from shardinit.core.plan.plan import Plan


class _Commands(Commands):
    def invoke(self, ctx: typer.Context) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        with interruptible():
            return super().invoke(ctx)


app = typer.Typer(
    cls=_Commands,
    name="shardinit",
    help="Sharded parameter initialisation for JAX.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # whose table cuts off names and lines where it is narrow
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(
    cls=settings.ServeCommand, context_settings={"auto_envvar_prefix": serving.PREFIX}
)(serving.serve)
app.command()(serving.health)
app.command()(programs.export)
app.command("compile")(programs.compile_for_here)
app.command()(programs.read)
app.command()(looking.inspect)
app.command()(changes.diff)
app.command()(changes.pin)
app.command()(checkpoints.init)
app.command()(checkpoints.digest)
app.command()(checkpoints.verify)
app.add_typer(client.app, name="client")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(version_line())
        raise typer.Exit()


_debugging = False


def _debug(wanted: bool) -> None:
    global _debugging
    _debugging = wanted


@app.callback()
def _options(
    _: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_print_version,
            is_eager=True,
            help="The versions of shardinit and JAX.",
        ),
    ] = False,
    _debug: Annotated[
        bool,
        typer.Option(
            "--debug", callback=_debug, help="Show the traceback of an error."
        ),
    ] = False,
) -> None:
    """Sharded parameter initialisation for JAX."""


@app.command()
def plan(
    source: Source,
    mesh: Annotated[
        str, typer.Option(help="Axes and sizes, such as data=2,model=4.")
    ] = "data=1",
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
    model: ModelName = "decoder",
    models: Modules = None,
    as_json: AsJson = False,
    html: Annotated[
        str | None, typer.Option(help="Write it as one page of HTML into this file.")
    ] = None,
    statistics: Annotated[
        bool, typer.Option(help="With --html: statistics of every leaf, by windows.")
    ] = False,
    seed: options.Seed = 0,
) -> None:
    """Shows where each leaf of a model would lie; needs no devices."""
    from shardinit.cli import tables

    if html is not None:
        check_target(html)
    elif statistics:
        raise UsageError("--statistics", "there is no --html", "--html FILE with it")

    state = (opt_rules, opt_memory, opt_state)
    given = (rules, select, strict, indivisible, memory_limit, prng, draw_dtype)
    asked = options.Asked(*given, state, seed)
    made = _planned(source, model, models, arguments.parse_mesh(mesh), asked)
    if html is not None:
        looking.write_page(made, html, seed if statistics else None)
    elif as_json:
        print(json.dumps(tables.plan_as_data(made), indent=1))
    else:
        tables.print_plan(made)


@app.command()
def audit(
    source: Source,
    topology: Annotated[
        str,
        typer.Option(
            help="Chips to compile for, such as tpu:v5p:16x16x16, gpu:h100:8x8 (hosts "
            "x devices) or cpu:8."
        ),
    ],
    mesh: Annotated[
        str | None,
        typer.Option(help="Axes and sizes; default one axis over all devices."),
    ] = None,
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
    """Compiles a model for chips that are not there; exit code 1 if it fails."""
    from shardinit.verify.audit import topology as topologies

    chips = topologies.topology(topology)
    axes = arguments.parse_mesh(mesh or f"device={chips.devices}")
    topologies.check_installed(chips)
    state = (opt_rules, opt_memory, opt_state)
    given = (rules, select, strict, indivisible, memory_limit, prng, draw_dtype)
    asked = options.Asked(*given, state, seed)
    made = _planned(source, model, models, axes, asked)
    from shardinit.cli import tables
    from shardinit.verify.audit.audit import audit as audit_plan

    with progress("compile", unit=""):
        report = audit_plan(made, topology)
    if as_json:
        print(json.dumps(report.to_data(), indent=1))
    else:
        tables.print_audit(report)
    if not report.ok:
        raise typer.Exit(1)


def _planned(
    source: str,
    model: str,
    modules: list[str] | None,
    axes: dict[str, int],
    asked: options.Asked,
) -> Plan:
    """The plan of a model on a mesh without devices."""
    devices.on_cpu()
    made = arguments.read_source(source, model, modules)
    return options.planned(made, arguments.abstract_mesh(axes), asked)


@app.command()
def models(
    models: Modules = None,
    as_json: AsJson = False,
) -> None:
    """Lists the names that a spec may be, and models with their config keys."""
    devices.on_cpu()
    from shardinit.cli import tables

    arguments.load_modules(models)
    found = tables.schemas()
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        tables.print_examples()
        tables.print_schemas(found)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Says what is installed, what of it is wrong, and the line that mends it."""
    from shardinit.doctor import report

    raise typer.Exit(report(as_json=as_json))


@app.command()
def demo(
    config: Annotated[
        str,
        typer.Option(help="A config.json, an example's name, JSON, or - for stdin."),
    ] = "tinyllama-1.1b",
) -> None:
    """Plans, serves, fetches, initialises and checks a model on 8 simulated devices."""
    from shardinit.cli.demo import run

    run(config)


def _show(message: Warning | str, *where: Any) -> None:
    """A warning as people read it, without the line of code that it came from."""
    print(message, file=sys.stderr)


def main() -> None:
    """Runs the command line; ends the process with its exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # of a locale that lacks a character
        sys.stdout.reconfigure(errors="backslashreplace")
    with warnings.catch_warnings():
        warnings.simplefilter("always", FindingsWarning)
        warnings.showwarning = _show
        keep_interrupts()
        end_with_code(app, debug=lambda: _debugging)
