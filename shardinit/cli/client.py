"""``shardinit client``: what a service has and does, for people at a shell.

Each command is one method of `shardinit.Client`, and prints what it gives: lines for
people, or with ``--json`` one JSON value.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from shardinit.cli import arguments, devices, options, programs, serving
from shardinit.cli.group import Commands
from shardinit.cli.outcomes import UsageError
from shardinit.cli.programs import AsJson, ModelName, WindowFile, WindowIndex
from shardinit.cli.targets import check_target, writing

if TYPE_CHECKING:
    from shardinit.service.client.client import Client
    from shardinit.service.client.connection import Credentials
    from shardinit.service.wire.description import Description
    from shardinit.service.wire.messages import Spec

app = typer.Typer(cls=Commands, help="Asks a running service.", no_args_is_help=True)

Source = Annotated[
    str,
    typer.Argument(
        help="The name of an example such as gpt2, a config.json, JSON itself, - for "
        "standard input, or the SHA-256 of a program that the service holds.",
        autocompletion=arguments.examples,
    ),
]


class _Asked:
    """The address of the service, and how to connect to it."""

    def __init__(self, target: str, timeout: float, credentials: Credentials):
        self.target = target
        self.timeout = timeout
        self.credentials = credentials

    def connect(self) -> Client:
        """A client."""
        from shardinit.service.client.client import connect

        given = vars(self.credentials)
        serving.check(self.target, self.timeout)
        return connect(self.target, timeout=self.timeout, **given)


@app.callback()
def whom(
    context: typer.Context,
    target: serving.Target = serving.TARGET,
    timeout: Annotated[float, typer.Option(help="Seconds that a call may take.")] = 120,
    tls: Annotated[bool, typer.Option(help="Encrypt, by the usual authorities.")] = (
        False
    ),
    ca: Annotated[
        Path | None, typer.Option(help="Authorities to trust instead (PEM).")
    ] = None,
    cert: Annotated[
        Path | None, typer.Option(help="One's own certificate chain (PEM).")
    ] = None,
    key: Annotated[Path | None, typer.Option(help="Its private key (PEM).")] = None,
    token_file: Annotated[
        Path | None, typer.Option(help="File with a bearer token.")
    ] = None,
    insecure: Annotated[
        bool, typer.Option(help="Send the token in clear to another machine too.")
    ] = False,
) -> None:
    """Asks a running service."""
    from shardinit.service.client.connection import Credentials

    credentials = Credentials(tls, ca, cert, key, token_file, insecure)
    context.obj = _Asked(target, timeout, credentials)


@app.command()
def health(
    context: typer.Context,
    target: Annotated[
        str | None, typer.Argument(help="Host and port, in place of --target.")
    ] = None,
    service: serving.Service = "",
    as_json: AsJson = False,
) -> None:
    """Whether it serves; exit code 1 if it does not."""
    asked: _Asked = context.obj
    credentials, timeout = asked.credentials, asked.timeout
    where = target or asked.target
    serving.say_health(where, credentials, service, timeout, as_json)


@app.command()
def version(context: typer.Context, as_json: AsJson = False) -> None:
    """The versions of the service, its JAX and the protocol."""
    with context.obj.connect() as client:
        _show(client.version(), as_json)


@app.command()
def models(context: typer.Context, as_json: AsJson = False) -> None:
    """The models that the operator installed, with their config keys."""
    with context.obj.connect() as client:
        found = client.models()
    if as_json:
        print(json.dumps(found, indent=1))
        return
    from shardinit.cli import tables

    tables.print_schemas(found)


@app.command()
def describe(
    context: typer.Context,
    source: Source,
    mesh: Annotated[
        str | None, typer.Option(help="Axes and sizes, such as data=2,model=4.")
    ] = None,
    rules: options.Rules = None,
    draw_dtype: options.DrawDtype = None,
    opt_rules: options.OptRules = None,
    opt_memory: options.OptMemory = None,
    opt_state: options.OptState = None,
    seed: options.Seed = 0,
    model: ModelName = "decoder",
    as_json: AsJson = False,
) -> None:
    """The leaves of a model, and with a mesh where they lie."""
    axes = None if mesh is None else arguments.parse_mesh(mesh)
    devices.on_cpu()
    placing = options.placing_of(rules, opt_rules, opt_memory, opt_state)
    with context.obj.connect() as client:
        spec = _spec(source, model, seed, draw_dtype)
        found = client.describe(spec, axes, **placing)
    if as_json:
        print(json.dumps(_as_data(found), indent=1))
        return
    from shardinit.cli import tables

    tables.print_description(found, axes)


@app.command()
def program(
    context: typer.Context,
    source: Source,
    out: Annotated[str, typer.Option("--out", "-o", help="The program file to write.")],
    draw_dtype: options.DrawDtype = None,
    seed: options.Seed = 0,
    model: ModelName = "decoder",
    as_json: AsJson = False,
) -> None:
    """Fetches a model's init program into a file."""
    check_target(out)
    devices.on_cpu()
    with context.obj.connect() as client:
        made = client.program(_spec(source, model, seed, draw_dtype))
    with writing(out):
        made.save(out)
    found = {
        "file": out,
        "leaves": len(made.paths),
        "fingerprint": made.fingerprint,
        "sha256": made.sha256,
    }
    _show(found, as_json)


@app.command()
def stream(
    context: typer.Context,
    source: Source,
    path: Annotated[str, typer.Argument(help="The leaf's path.")],
    window: WindowIndex = "...",
    seed: options.Seed = 0,
    draw_dtype: options.DrawDtype = None,
    out: WindowFile = None,
    model: ModelName = "decoder",
    as_json: AsJson = False,
) -> None:
    """Has the service compute one window of one leaf, and prints or keeps it."""
    if out is not None:
        check_target(out)
    index = programs.parse_window(window)
    with context.obj.connect() as client:
        spec = _spec(source, model, seed, draw_dtype)
        values = client.read(spec, seed, path, index)
    programs.show_window(values, path, window, out, as_json)


@app.command()
def checkpoint(
    context: typer.Context,
    source: Source,
    uri: Annotated[str, typer.Argument(help="Where, on the service's storage.")],
    seed: options.Seed = 0,
    draw_dtype: options.DrawDtype = None,
    layout: Annotated[
        Literal["safetensors", "orbax"], typer.Option("--format", help="Its format.")
    ] = "safetensors",
    detach: Annotated[
        bool, typer.Option(help="The write goes on when this command ends.")
    ] = False,
    model: ModelName = "decoder",
    as_json: AsJson = False,
) -> None:
    """Has the service write a checkpoint on its own storage."""
    with context.obj.connect() as client:
        spec = _spec(source, model, seed, draw_dtype)
        written = client.write_checkpoint(spec, seed, uri, format=layout, detach=detach)
    receipt = json.loads(written.receipt_json)
    if as_json:
        print(json.dumps({"uri": written.uri, "receipt": receipt}, indent=1))
    else:
        print(f"wrote {written.uri}\nroot {receipt['root']}")


def _spec(source: str, model: str, seed: Any, draw_dtype: str | None) -> Spec:
    """What was typed as a spec, with how it is drawn and the streams of its key.

    Raises:
      UsageError: ``--draw-dtype`` for a program.
    """
    from shardinit.service.wire.messages import spec_for

    if not re.fullmatch(r"[0-9a-f]{64}", source):
        return spec_for(arguments.read_spec(source, model), seed, draw_dtype)
    if draw_dtype is not None:
        raise UsageError(
            "--draw-dtype", "the draws of a program are settled", "a model's config"
        )
    return source


def _show(found: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        print(f"{name} {value}")


def _as_data(found: Description) -> dict[str, Any]:
    return {
        "fingerprint": found.fingerprint,
        "total_bytes": found.total_bytes,
        "bytes_per_device": found.bytes_per_device,
        "host_bytes_per_device": found.host_bytes_per_device,
        "parameter_count": found.parameter_count,
        "programs": found.programs,
        "findings": [finding.as_data() for finding in found.findings],
        "leaves": [vars(leaf) for leaf in found.leaves],
    }
