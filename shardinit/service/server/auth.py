"""Auth: who may call, by certificate or by token.

Two independent means, each from files that an operator can replace while the server
runs: certificates are read again at a handshake, tokens at a call, when the files have
changed. A file that has become unreadable or empty leaves what was known in force and
is complained about in the log, since a half-written file must not lock everybody out
nor let anybody in.

Tokens are compared by their SHA-256, all of them for every call and each in constant
time, so that the time of a refusal says nothing. Health needs no token: it says only
that the server is there, and probes have no secrets.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import grpc

from shardinit.errors import ServiceError
from shardinit.service.server.config import Config
from shardinit.service.wire.access import ROLES, read_tokens

log = logging.getLogger("shardinit.service")

Value = TypeVar("Value")


class Watched(Generic[Value]):
    """What files say, read again when one of them has changed.

    Args:
      paths: the files.
      parse: makes the value of their contents; raises ValueError if they are wrong.

    Raises:
      ServiceError: a file cannot be read, or ``parse`` refused.
    """

    def __init__(self, paths: list[Path], parse: Callable[[list[bytes]], Value]):
        self._paths = paths
        self._parse = parse
        self._lock = threading.Lock()
        try:
            self._seen = self._stamp()
            self.value = self._read()
        except (OSError, ValueError) as error:
            raise ServiceError(
                ", ".join(map(str, paths)),
                getattr(error, "strerror", None) or str(error),
                "files that can be read",
                code="FAILED_PRECONDITION",
            ) from error

    def refresh(self) -> bool:
        """Reads changed files; returns whether there is a new value."""
        with self._lock:
            try:
                stamp = self._stamp()
                if stamp == self._seen:
                    return False
                value = self._read()
                self._seen = stamp
            except (OSError, ValueError) as error:
                log.error("%s: %s; what it said before holds", self._paths[0], error)
                return False
            changed = value != self.value
            self.value = value
            return changed

    def _stamp(self) -> list[tuple[int, int, int]]:
        stats = [path.stat() for path in self._paths]
        return [(s.st_mtime_ns, s.st_size, s.st_ino) for s in stats]

    def _read(self) -> Value:
        return self._parse([path.read_bytes() for path in self._paths])


class Caller(NamedTuple):
    """Who calls.

    Attributes:
      name: equal for all calls of one; says nothing that is secret.
      roles: what it may do.
    """

    name: str
    roles: frozenset[str] = ROLES


class Tokens:
    """Bearer tokens from a file, with whose they are and what their holders may do.

    Raises:
      ServiceError: the file cannot be read, or holds no token.
    """

    def __init__(self, path: Path):
        self._file = Watched([path], _callers)

    def find(self, header: str) -> Caller | None:
        """Whose token ``authorization: header`` carries; None for nobody's."""
        self._file.refresh()
        scheme, _, token = header.partition(" ")
        given = hashlib.sha256(token.strip().encode()).digest()
        found = None
        for known, caller in self._file.value.items():
            if hmac.compare_digest(known, given):
                found = caller
        return found if scheme.lower() == "bearer" else None


def _callers(contents: list[bytes]) -> dict[bytes, Caller]:
    """Callers by the SHA-256 of their token."""
    tokens = read_tokens(contents[0])
    if not tokens or any(len(one.token) < 16 for one in tokens):
        raise ValueError("expected tokens of 16 characters or more, one a line")
    found = {}
    for one in tokens:
        digest = hashlib.sha256(one.token)
        name = one.name or f"token {digest.hexdigest()[:12]}"
        found[digest.digest()] = Caller(name, one.roles)
    return found


def server_credentials(config: Config) -> grpc.ServerCredentials | None:
    """TLS, or mutual TLS, from the config's files; None without a certificate.

    Raises:
      ServiceError: a file cannot be read or holds no PEM.
    """
    if config.tls_cert is None or config.tls_key is None:
        return None
    paths = [config.tls_key, config.tls_cert]
    paths += [config.client_ca] if config.client_ca is not None else []
    files = Watched(paths, _pem)

    def configuration() -> grpc.ServerCertificateConfiguration:
        key, chain, *authorities = files.value
        return grpc.ssl_server_certificate_configuration(
            [(key, chain)], root_certificates=authorities[0] if authorities else None
        )

    def changed() -> Any:  # None for no change, which the stubs lack
        return configuration() if files.refresh() else None

    return grpc.dynamic_ssl_server_credentials(
        configuration(),
        changed,
        require_client_authentication=config.client_ca is not None,
    )


def _pem(contents: list[bytes]) -> list[bytes]:
    if not all(b"-----BEGIN" in content for content in contents):
        raise ValueError("not PEM")
    return contents
