"""Settings: what an operator may say of a server, as options of ``shardinit serve``.

A field of `Settings` is a setting's only definition. Its text is in ``--help``, and
where it is a limit also in docs/service.md and in the proto's comments; a test holds
them to be the same.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, NamedTuple, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperCommand

from shardinit.cli import arguments
from shardinit.service.server.config import Config, Limit, Listen, Setting
from shardinit.service.wire.limits import DEFAULTS, Limits, amount


@dataclass(frozen=True)
class Settings(Config):
    """A server's config, and what its process has to know beside it."""

    listen: Listen = "127.0.0.1:50051"
    grace: Annotated[
        float, Limit("Until calls that still run are handed back at the end.", 0)
    ] = 30.0
    log_level: Annotated[
        str, Setting("debug, info, warning or error; logs go to stderr.")
    ] = "info"
    log_format: Annotated[str, Setting("text or json.")] = "text"


class Row(NamedTuple):
    """A limit as it is told to people: its name, its value with the unit, its text."""

    name: str
    value: str
    meaning: str


def limits_of_server() -> list[Row]:
    """What an operator may set, with the defaults."""
    return [
        Row(_flag(name, what).removeprefix("--"), _default(name), what.help)
        for name, _, what in _fields()
        if isinstance(what, Limit)
    ]


def limits_of_request() -> list[Row]:
    """What is the same for every server."""
    return [
        Row(name, amount(name, getattr(DEFAULTS, name)), meaning)
        for name, meaning in Limits.meanings().items()
    ]


def options() -> Iterator[inspect.Parameter]:
    """The settings as arguments of a command, of which typer makes options."""
    for name, kind, what in _fields():
        default = getattr(Settings, name)
        if isinstance(default, tuple):
            kind, default = list[get_args(kind)[0]] | None, None
        given: dict[str, Any] = {}
        if isinstance(what, Limit):
            given = {"min": what.least}
            if name.endswith("_bytes"):
                given = {"parser": partial(_parse_bytes, name, what.least)}
        option = typer.Option(
            _flag(name, what), help=what.help, show_envvar=False, **given
        )
        yield inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=default,
            annotation=Annotated[kind, option],
        )


class ServeCommand(TyperCommand):
    """Its help tells limits apart from what is no limit, and those of a request too."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Writes three sections, where a command usually has one."""
        limits = [row._replace(name=f"--{row.name}") for row in limits_of_server()]
        names = {row.name for row in limits}
        others = [x for x in self.get_params(ctx) if names.isdisjoint(x.opts)]
        with formatter.section("Options"):
            formatter.write_dl(filter(None, (x.get_help_record(ctx) for x in others)))
        for title, rows in (
            ("Limits, options with their defaults", limits),
            ("Limits of a request, which no option changes", limits_of_request()),
        ):
            width = max(len(row.name) for row in rows)
            told = [(f"{x.name:{width}}  {x.value}", x.meaning) for x in rows]
            with formatter.section(title):
                formatter.write_dl(told, col_max=40)


def _fields() -> Iterator[tuple[str, Any, Setting | Limit]]:
    """The name, the type and the description of each setting."""
    for name, hint in get_type_hints(Settings, include_extras=True).items():
        if get_origin(hint) is Annotated:
            yield name, *get_args(hint)


def _flag(name: str, what: Setting | Limit) -> str:
    usual = f"--{name.replace('_', '-')}"
    return (what.flag if isinstance(what, Setting) else None) or usual


def _default(name: str) -> str:
    return "one a core" if name == "workers" else amount(name, getattr(Settings, name))


def _parse_bytes(name: str, least: float, text: Any) -> int:
    """``16GiB`` or a number, for an option, a variable or a key of a file."""
    size = str(text)
    flag = f"--{name.replace('_', '-')}"
    found = int(size) if size.isdecimal() else arguments.parse_bytes(size, flag)
    if found < least:
        raise typer.BadParameter(f"{size} is less than {amount(name, int(least))}")
    return found
