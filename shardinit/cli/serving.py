"""Serving: ``shardinit serve`` and the probe that asks whether it serves.

Every setting may be given as a flag, in the environment
(``SHARDINIT_LISTEN``), or in a TOML file (``listen = "127.0.0.1:50051"``); a flag wins
over the environment, the environment over the file, the file over the default. What is
in the environment or the file and is no field is an error.
"""

from __future__ import annotations

import inspect
import json
import logging
import os
import re
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shardinit.cli import arguments, devices
from shardinit.cli.outcomes import UsageError
from shardinit.cli.programs import AsJson
from shardinit.cli.settings import Settings, options
from shardinit.errors import ArgumentError
from shardinit.extras import needs

if TYPE_CHECKING:
    from shardinit.service.client.connection import Credentials

PREFIX = "SHARDINIT"  # of variables

# The library reads it, in every process: `shardinit.core.run.processes`.
_ELSEWHERE = {f"{PREFIX}_PROCESS_WAIT"}

# Kubernetes puts the addresses of every service into the environment of a namespace's
# pods, and ours is called shardinit (SHARDINIT_SERVICE_HOST, SHARDINIT_PORT_50051_TCP):
# https://kubernetes.io/docs/concepts/services-networking/service/#environment-variables
_LINK = re.compile(
    rf"{PREFIX}_(\w+_)?(SERVICE_(HOST|PORT)(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_\w+)?)?)"
)


_OPTIONS = {option.name: option for option in options()}


def _read_file(context: typer.Context, path: Path | None) -> Path | None:
    """Makes the file's values the defaults of the other options."""
    if path is None:
        return None
    try:
        values = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"{path}: {error}") from error
    for name in values:
        if name.replace("-", "_") not in _OPTIONS:
            options = ", ".join(sorted(_OPTIONS))
            raise typer.BadParameter(f"{path}: {name!r} is none of {options}")
    given = {name.replace("-", "_"): value for name, value in values.items()}
    context.default_map = {**(context.default_map or {}), **given}
    return path


def _check_environment(names: Iterable[str]) -> None:
    """Refuses variables that look like options and are none."""
    known = {f"{PREFIX}_{name.upper()}" for name in ("config", *_OPTIONS)} | _ELSEWHERE
    ours = {name for name in names if name.startswith(f"{PREFIX}_")}
    unknown = sorted(name for name in ours - known if not _LINK.fullmatch(name))
    if unknown:
        options = ", ".join(sorted(known))
        raise typer.BadParameter(f"{', '.join(unknown)}: none of {options}")


def serve(
    context: typer.Context,
    config: Annotated[
        Path | None,
        typer.Option(
            callback=_read_file,
            is_eager=True,
            help="TOML file with any of these options; flags and environment win.",
        ),
    ] = None,
    **given: Any,
) -> None:
    """Serves the installed models until SIGTERM or Ctrl-C.

    Options may also be given in the environment (SHARDINIT_LISTEN=...) or in a file.
    Those of bytes take a unit too: 16GiB.
    """
    _check_environment(os.environ)
    devices.on_cpu()
    for name in ("models", "checkpoint_roots"):
        given[name] = tuple(given[name] or ())
    settings = Settings(**given)
    settings.check()  # before the slow imports
    _log(arguments.parse_level(settings.log_level), settings.log_format)
    with needs("grpc", "shardinit[service]"):
        from shardinit.service.server import server

    def announce(running: server.Server) -> None:
        for what, address in (
            ("health", running.health_address),
            ("metrics", running.metrics_address),
        ):
            if address is not None:
                print(f"shardinit has {what} on {address}", flush=True)
        print(f"shardinit serves on {running.address}", flush=True)

    server.serve(settings, announce=announce, grace=settings.grace)
    # Nothing runs any more that matters, and gRPC's threads take their time to end.
    logging.shutdown()
    sys.stdout.flush()
    os._exit(0)


# Typer reads a command's options from its signature.
_context, _config, _given = inspect.signature(serve, eval_str=True).parameters.values()
_signature = inspect.Signature([_context, _config, *_OPTIONS.values()])
setattr(serve, "__signature__", _signature)  # noqa: B010  unknown to type checkers


def _log(level: int, form: str) -> None:
    from shardinit.service.server.telemetry import JsonFormatter

    if form not in ("text", "json"):
        raise UsageError("--log-format", repr(form), "text or json")
    handler = logging.StreamHandler(sys.stderr)
    text = "%(asctime)s %(levelname)s %(name)s %(message)s"
    handler.setFormatter(JsonFormatter() if form == "json" else logging.Formatter(text))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("shardinit").setLevel(level)


TARGET = "127.0.0.1:50051"
Target = Annotated[
    str, typer.Option("--target", "-t", help="Host and port of the service.")
]
Service = Annotated[str, typer.Option(help="Service to ask about.")]


def health(
    target: Annotated[
        str | None, typer.Argument(help="Host and port, in place of --target.")
    ] = None,
    to: Target = TARGET,
    service: Service = "",
    ca: Annotated[
        Path | None, typer.Option(help="Authorities of the server (PEM): use TLS.")
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds to wait.")] = 5.0,
    as_json: AsJson = False,
) -> None:
    """Asks a server whether it serves; exit code 0 if it does, for probes.

    `shardinit client health` is the same, with all options of a connection.
    """
    from shardinit.service.client.connection import Credentials

    say_health(target or to, Credentials(ca=ca), service, timeout, as_json)


def say_health(
    target: str, credentials: Credentials, service: str, timeout: float, as_json: bool
) -> None:
    """Prints what a server says of the health of one of its services.

    Raises:
      Exit: it does not serve.
      UsageError: the target is no address.
      ServiceError: it gives no answer in time.
    """
    check(target, timeout)
    name = _ask_health(target, credentials, service, timeout)
    typer.echo(json.dumps({"status": name}) if as_json else name)
    if name != "SERVING":
        raise typer.Exit(1)


def check(target: str, timeout: float) -> None:
    """Refuses what is no address, and no time to wait.

    Raises:
      UsageError: it is none.
    """
    from shardinit.service.client.connection import check_target

    try:
        check_target(target, timeout)
    except ArgumentError as error:
        where = f"--{error.where}"
        raise UsageError(where, error.got, error.expected, error.remedy) from None


def _ask_health(
    target: str, credentials: Credentials, service: str, timeout: float
) -> str:
    with needs("grpc", "shardinit[service]"):
        import grpc
        from grpc_health.v1 import health_pb2, health_pb2_grpc

        from shardinit.service.wire.errors import from_rpc_error

    with credentials.channel(target, ()) as channel:
        request = health_pb2.HealthCheckRequest(service=service)
        try:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            given = credentials.header()
            answer = stub.Check(request, timeout=timeout, metadata=given)
        except grpc.RpcError as error:
            raise from_rpc_error(error, f"health of {target}") from error
    return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
