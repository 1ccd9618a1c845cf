"""Serving: ``shardinit serve`` and the probe that asks whether it serves.

Every option of the server may be given as a flag, in the environment
(``SHARDINIT_LISTEN``), or in a TOML file (``listen = "127.0.0.1:50051"``); a flag wins
over the environment, the environment over the file, the file over the default.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
import tomllib
from pathlib import Path
from typing import Annotated, Any

import typer

from shardinit.cli import arguments, devices
from shardinit.cli.programs import Modules
from shardinit.errors import ServiceError, ShardinitError


def _read_file(context: typer.Context, path: Path | None) -> Path | None:
    """Makes the file's values the defaults of the other options."""
    if path is None:
        return None
    try:
        values = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"{path}: {error}") from error
    known = {p.name: p for p in context.command.params if p.name != "config"}
    for name in values:
        if name.replace("-", "_") not in known:
            options = ", ".join(sorted(filter(None, known)))
            raise typer.BadParameter(f"{path}: {name!r} is none of {options}")
    given: dict[str, Any] = {k.replace("-", "_"): v for k, v in values.items()}
    context.default_map = {**(context.default_map or {}), **given}
    return path


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
    listen: Annotated[
        str, typer.Option(help="Host and port, or unix:/path; port 0 takes a free one.")
    ] = "127.0.0.1:50051",
    models: Modules = None,
    tls_cert: Annotated[
        Path | None, typer.Option(help="The server's certificate chain (PEM).")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its private key (PEM).")] = None,
    client_ca: Annotated[
        Path | None,
        typer.Option(help="Authorities of client certificates (PEM): mutual TLS."),
    ] = None,
    token_file: Annotated[
        Path | None, typer.Option(help="Bearer tokens, one a line; read when changed.")
    ] = None,
    insecure: Annotated[
        bool,
        typer.Option(
            "--insecure",
            help="Let other machines in without TLS or without credentials.",
        ),
    ] = False,
    health_listen: Annotated[
        str | None, typer.Option(help="A second, plain port for health probes alone.")
    ] = None,
    metrics_listen: Annotated[
        str | None, typer.Option(help="Host and port of Prometheus metrics (HTTP).")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Threads of short calls.")] = 16,
    streams: Annotated[
        int, typer.Option(min=1, help="Streams and checkpoints at a time.")
    ] = 8,
    queue: Annotated[
        int, typer.Option(min=1, help="Calls that may wait; one more is refused.")
    ] = 1024,
    cache_bytes: Annotated[
        int, typer.Option(min=0, help="Bytes of plans and programs to keep.")
    ] = 256 << 20,
    block_bytes: Annotated[
        int, typer.Option(min=4096, help="Bytes that a stream computes at a time.")
    ] = 4 << 20,
    whole_bytes: Annotated[
        int,
        typer.Option(min=0, help="Most bytes of a leaf that must be computed whole."),
    ] = 256 << 20,
    model_bytes: Annotated[
        int, typer.Option(min=0, help="Most bytes of a model that Orbax writes.")
    ] = 4 << 30,
    allow_upload: Annotated[
        bool, typer.Option("--allow-upload", help="Clients may register programs.")
    ] = False,
    checkpoint_roots: Annotated[
        list[Path] | None,
        typer.Option(
            "--checkpoint-root",
            help="Folder under which checkpoints may be written; may be repeated.",
        ),
    ] = None,
    grace: Annotated[
        float, typer.Option(min=0, help="Seconds that running calls get at the end.")
    ] = 30.0,
    log_level: Annotated[
        str, typer.Option(help="debug, info, warning or error; logs go to stderr.")
    ] = "info",
    log_format: Annotated[str, typer.Option(help="text or json.")] = "text",
) -> None:
    """Serves the installed models until SIGTERM or Ctrl-C.

    Options may also be given in the environment (SHARDINIT_LISTEN=...) or in a file.
    """
    devices.on_cpu()
    from shardinit.service.server.config import Config

    given: dict[str, Any] = dict(context.params) | {
        "checkpoint_roots": tuple(checkpoint_roots or ())
    }
    names = {field.name for field in dataclasses.fields(Config)}
    made = Config(**{name: value for name, value in given.items() if name in names})
    made.check()  # before the slow imports
    _log(arguments.parse_level(log_level), log_format)
    arguments.load_modules(models)
    import shardinit.core.program.program  # noqa: F401  the first call must not wait for JAX
    from shardinit.service.server import server

    def announce(running: server.Server) -> None:
        for what, address in (
            ("health", running.health_address),
            ("metrics", running.metrics_address),
        ):
            if address is not None:
                print(f"shardinit has {what} on {address}", flush=True)
        print(f"shardinit serves on {running.address}", flush=True)

    server.serve(made, announce=announce, grace=grace)
    # What still runs now is a build that nobody waits for. Python would wait for its
    # thread, and the supervisor that sent the signal would kill the process.
    logging.shutdown()
    sys.stdout.flush()
    os._exit(0)


def _log(level: int, form: str) -> None:
    from shardinit.service.server.telemetry import JsonFormatter

    if form not in ("text", "json"):
        raise ShardinitError("--log-format", repr(form), "text or json")
    handler = logging.StreamHandler(sys.stderr)
    text = "%(asctime)s %(levelname)s %(name)s %(message)s"
    handler.setFormatter(JsonFormatter() if form == "json" else logging.Formatter(text))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("shardinit").setLevel(level)


def health(
    target: Annotated[str, typer.Argument(help="Host and port of a server.")],
    service: Annotated[str, typer.Option(help="Service to ask about.")] = "",
    ca: Annotated[
        Path | None, typer.Option(help="Authorities of the server (PEM): use TLS.")
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds to wait.")] = 5.0,
) -> None:
    """Asks a server whether it serves; exit code 0 if it does, for probes."""
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    from shardinit.service.client.connection import Credentials

    with Credentials(ca=ca).channel(target, ()) as channel:
        request = health_pb2.HealthCheckRequest(service=service)
        try:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            answer = stub.Check(request, timeout=timeout)
        except grpc.RpcError as error:
            code: Any = getattr(error, "code", lambda: None)()
            text = f"no health ({getattr(code, 'name', error)})"
            raise ServiceError(target, text, code="UNAVAILABLE") from error
    name = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    typer.echo(name)
    if name != "SERVING":
        raise typer.Exit(1)
