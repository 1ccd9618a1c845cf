"""Config: everything that an operator may say about a server, in one place.

A plain frozen object, so that a test, a program and the command line make the same
server from it. A field is a setting's only definition: ``shardinit serve`` makes of it
a flag, an environment variable and a key of its file. What is said here is checked when
the server is made, before any port is opened.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, get_args, get_type_hints

from shardinit.errors import ServiceError
from shardinit.service.wire.access import is_local, split_address
from shardinit.service.wire.limits import Limits


@dataclass(frozen=True)
class Setting:
    """What an operator may say of a field.

    Attributes:
      help: what it is for.
      flag: its flag, where that is not the field's name.
    """

    help: str
    flag: str | None = None


@dataclass(frozen=True)
class Limit:
    """What a field bounds; the unit says `shardinit.service.wire.limits.amount`.

    Attributes:
      help: what it bounds, as ``--help``, docs/service.md and the proto have it.
      least: the least number that a flag, a variable or a file may give.
    """

    help: str
    least: float


def _cores() -> int:
    """Cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


Listen = Annotated[
    str, Setting("Host and port, or unix:/path; port 0 takes a free one.")
]


@dataclass(frozen=True)
class Config:
    """How to serve; the defaults serve this machine only.

    What a field is for says its `Setting` or `Limit`; ``shardinit serve --help``.

    Attributes:
      limits: caps on requests; no option, for programs only.
    """

    listen: Listen = "127.0.0.1:0"
    tls_cert: Annotated[
        Path | None, Setting("The server's certificate chain (PEM).")
    ] = None
    tls_key: Annotated[Path | None, Setting("Its private key (PEM).")] = None
    client_ca: Annotated[
        Path | None, Setting("Authorities of client certificates (PEM): mutual TLS.")
    ] = None
    token_file: Annotated[
        Path | None,
        Setting(
            "Who may call, one a line: TOKEN, or NAME ROLES TOKEN [WEIGHT]; behind it "
            "models=A,B and roots=/A,/B, if it may use those alone."
        ),
    ] = None
    insecure: Annotated[
        bool, Setting("Let other machines in without TLS or without credentials.")
    ] = False
    health_listen: Annotated[
        str | None, Setting("A second, plain port for health probes alone.")
    ] = None
    metrics_listen: Annotated[
        str | None, Setting("Host and port of Prometheus metrics (HTTP).")
    ] = None
    models: Annotated[
        tuple[str, ...], Setting("Module that registers models; may be repeated.")
    ] = ()
    workers: Annotated[
        int,
        Limit("Builds and blocks at a time, a process each; callers take turns.", 1),
    ] = _cores()
    queue: Annotated[
        int, Limit("Builds that wait for a worker; shared by callers.", 1)
    ] = 1024
    streams: Annotated[
        int, Limit("Streams of windows at a time; shared by callers.", 1)
    ] = 128
    writes: Annotated[
        int, Limit("Checkpoints at a time, a process each; shared by callers.", 1)
    ] = 4
    caller_calls: Annotated[
        int,
        Limit("Calls at a time of one caller: a token, a certificate, an address.", 1),
    ] = 4096
    connection_calls: Annotated[
        int, Limit("Calls at a time on one connection; more wait in the client.", 1)
    ] = 256
    peer_connections: Annotated[
        int, Limit("Connections of one address that have calls.", 1)
    ] = 4096
    caller_rate: Annotated[
        int,
        Limit("Bytes a second to one caller, times its weight; it waits. 0: any.", 0),
    ] = 0
    idle_seconds: Annotated[
        float, Limit("Until a connection without calls ends.", 1)
    ] = 3600.0
    connection_seconds: Annotated[
        float,
        Limit("Until a connection takes no new calls; those that run go on.", 1),
    ] = 86400.0
    ping_seconds: Annotated[float, Limit("Between a client's pings, at least.", 0)] = (
        10.0
    )
    message_seconds: Annotated[
        float,
        Limit("Until a caller's message has come; then DEADLINE_EXCEEDED.", 0.1),
    ] = 10.0
    stall_seconds: Annotated[
        float,
        Limit(
            "Until a reader takes a message; then UNAVAILABLE, and it goes on where it "
            "was.",
            0.1,
        ),
    ] = 120.0
    list_seconds: Annotated[
        float, Limit("GetVersion, ListModels; then DEADLINE_EXCEEDED.", 0.1)
    ] = 600.0
    describe_seconds: Annotated[
        float,
        Limit(
            "DescribeModel, GetProgram, with their wait; then DEADLINE_EXCEEDED.", 0.1
        ),
    ] = 3600.0
    stream_seconds: Annotated[
        float,
        Limit(
            "StreamShards; then DEADLINE_EXCEEDED, and it goes on where it was.", 0.1
        ),
    ] = 86400.0
    write_seconds: Annotated[
        float,
        Limit("WriteCheckpoint, of one that watches; then DEADLINE_EXCEEDED.", 0.1),
    ] = 604800.0
    upload_seconds: Annotated[
        float, Limit("UploadProgram; then DEADLINE_EXCEEDED.", 0.1)
    ] = 3600.0
    build_seconds: Annotated[
        float,
        Limit("A build, a block of a stream, a window of a checkpoint.", 1),
    ] = 600.0
    unfinished_seconds: Annotated[
        float,
        Limit(
            "Until the NAME.unfinished of a checkpoint that nobody goes on with is "
            "removed.",
            1,
        ),
    ] = 604800.0
    worker_bytes: Annotated[
        int, Limit("Resident memory of a worker, with what it starts.", 256 << 20)
    ] = 16 << 30
    upload_bytes: Annotated[int, Limit("Uploads under way; shared by callers.", 0)] = (
        512 << 20
    )
    cache_bytes: Annotated[
        int,
        Limit(
            "Programs in the store, shared by owners; answers; plans in each worker.", 0
        ),
    ] = 256 << 20
    block_bytes: Annotated[int, Limit("What a stream computes at a time.", 4096)] = (
        4 << 20
    )
    whole_bytes: Annotated[int, Limit("A leaf that must be computed whole.", 0)] = (
        256 << 20
    )
    model_bytes: Annotated[int, Limit("A model that Orbax writes.", 0)] = 4 << 30
    checkpoint_bytes: Annotated[int, Limit("A checkpoint.", 0)] = 16 << 40
    free_bytes: Annotated[
        int, Limit("What checkpoints leave free of their disk.", 0)
    ] = 1 << 30
    store: Annotated[
        Path | None,
        Setting("Folder of programs, which replicas may share; default one's own."),
    ] = None
    objects: Annotated[
        str | None,
        Setting("Object store of programs beside it, as fsspec's URL: s3://bucket/at."),
    ] = None
    # A program is code for XLA that a worker compiles and runs: allow it only to
    # clients that you trust as much as you trust the models you installed.
    allow_upload: Annotated[bool, Setting("Clients may register programs.")] = False
    checkpoint_roots: Annotated[
        tuple[Path, ...],
        Setting(
            "Folder under which checkpoints may be written; may be repeated.",
            flag="--checkpoint-root",
        ),
    ] = ()
    limits: Limits = field(default_factory=Limits)

    def to_json(self) -> bytes:
        """The settings as a worker is told them."""
        said = {each.name: getattr(self, each.name) for each in fields(Config)}
        said["limits"] = asdict(self.limits)
        return json.dumps(said, default=os.fspath).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Config:
        """What ``to_json`` wrote."""
        said = json.loads(data)
        for name, hint in get_type_hints(cls).items():
            value, kinds = said[name], get_args(hint)
            if hint is Limits:
                said[name] = Limits(**value)
            elif isinstance(value, list):
                said[name] = tuple(map(kinds[0], value))
            elif value is not None and Path in kinds:
                said[name] = Path(value)
        return cls(**said)

    def check(self) -> None:
        """Holds the settings against each other.

        Raises:
          ServiceError: they contradict each other, an address is malformed, or one
            that other machines can reach has no TLS or lets anybody in.
        """
        if (self.tls_cert is None) != (self.tls_key is None):
            got = "a certificate" if self.tls_cert else "a key"
            raise _wrong("TLS", f"{got} alone", "a certificate and its key")
        if self.client_ca is not None and self.tls_cert is None:
            raise _wrong("client_ca", "no TLS", "a certificate and its key too")
        for listen in (self.health_listen, self.metrics_listen):
            if listen is not None:
                split_address(listen)
        if not self.insecure and not is_local(self.listen):
            self._check_guarded()

    def _check_guarded(self) -> None:
        """Refuses an address that others can reach, without TLS or for anybody."""
        guarded = self.client_ca is not None or self.token_file is not None
        if self.tls_cert is None or not guarded:
            missing = "TLS" if self.tls_cert is None else "asking who calls"
            raise ServiceError(
                f"listen address {self.listen!r}",
                f"it can be reached from other machines, without {missing}",
                "a certificate with its key, and tokens or a client CA",
                "Give --tls-cert, --tls-key and --token-file or --client-ca; listen on "
                "127.0.0.1; or say --insecure if something in front does all that",
                code="FAILED_PRECONDITION",
            )


def _wrong(where: str, got: str, expected: str) -> ServiceError:
    return ServiceError(where, got, expected, code="INVALID_ARGUMENT")
