"""Config: everything that an operator may say about a server, in one place.

A plain frozen object, so that a test, a program and the command line make the same
server from it. The command line fills it from flags, from the environment, from a file
and from these defaults, in this order of precedence (see ``shardinit serve --help``).
What is said here is checked when the server is made, before any port is opened.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from shardinit.errors import ServiceError
from shardinit.service.wire.access import is_local, split_address
from shardinit.service.wire.limits import Limits


@dataclass(frozen=True)
class Config:
    """How to serve; the defaults serve this machine only.

    Attributes:
      listen: ``host:port`` or ``unix:/path``; port 0 takes a free one.
      tls_cert: file with the server's certificate chain (PEM); with ``tls_key``.
      tls_key: file with its private key (PEM).
      client_ca: file with the authorities of client certificates (PEM): every client
        must then show one.
      token_file: file with bearer tokens, see `shardinit.service.server.auth.Tokens`.
      insecure: listen beyond this machine without TLS and clients' credentials.
      health_listen: ``host:port`` of a second, plain port that answers health alone,
        for probes that know neither TLS nor tokens.
      metrics_listen: ``host:port`` of Prometheus metrics over HTTP.
      workers: threads for short calls.
      streams: threads for calls that send bytes or write checkpoints: no more than
        this many run at a time.
      queue: calls of each kind that may wait for a thread; one more is refused with
        RESOURCE_EXHAUSTED.
      cache_bytes: bound on what is kept of programs, and again of descriptions.
      block_bytes: bytes of a leaf that one stream computes at a time.
      whole_bytes: bytes that a leaf which cannot be windowed may take in one stream;
        a larger one is refused.
      model_bytes: bytes that a model may take which is written whole, by Orbax.
      allow_upload: clients may register programs of their own (`UploadProgram`). A
        program is code for XLA that this process compiles and runs: allow it only to
        clients that you trust as much as you trust the models you installed.
      checkpoint_roots: folders under which `WriteCheckpoint` may write.
      limits: caps on requests.
    """

    listen: str = "127.0.0.1:0"
    tls_cert: Path | None = None
    tls_key: Path | None = None
    client_ca: Path | None = None
    token_file: Path | None = None
    insecure: bool = False
    health_listen: str | None = None
    metrics_listen: str | None = None
    workers: int = 16
    streams: int = 8
    queue: int = 1024
    cache_bytes: int = 256 << 20
    block_bytes: int = 4 << 20
    whole_bytes: int = 256 << 20
    model_bytes: int = 4 << 30
    allow_upload: bool = False
    checkpoint_roots: tuple[Path, ...] = ()
    limits: Limits = field(default_factory=Limits)

    def check(self) -> None:
        """Holds the settings against each other.

        Raises:
          ServiceError: they contradict each other, an address is malformed, or one
            that other machines can reach has no TLS or lets anybody in.
        """
        if (self.tls_cert is None) != (self.tls_key is None):
            came = "a certificate" if self.tls_cert else "a key"
            raise _wrong("TLS", f"{came} alone", "a certificate and its key")
        if self.client_ca is not None and self.tls_cert is None:
            raise _wrong("client_ca", "no TLS", "a certificate and its key too")
        for listen in (self.health_listen, self.metrics_listen):
            if listen is not None:
                split_address(listen)
        guarded = self.client_ca is not None or self.token_file is not None
        if self.insecure or is_local(self.listen):
            return
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


def _wrong(where: str, came: str, expected: str) -> ServiceError:
    return ServiceError(where, came, expected, code="INVALID_ARGUMENT")
