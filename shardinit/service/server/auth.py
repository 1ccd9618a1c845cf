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
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar
from urllib.parse import quote

import grpc

from shardinit.errors import ServiceError
from shardinit.service.server.config import Config
from shardinit.service.server.objects import EVERYBODY
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
      weight: its share of the workers, against that of others.
      folder: the folder of its own below a root of checkpoints; empty for the root.
      owner: whose its uploads are; empty for all who are known by address alone.
      models: the registered models that it may use; None for all.
      roots: the roots of checkpoints that it may write below; None for all.
    """

    name: str
    roles: frozenset[str] = ROLES
    weight: int = 1
    folder: str = ""
    owner: str = ""
    models: frozenset[str] | None = None
    roots: frozenset[str] | None = None

    @property
    def finds(self) -> tuple[str, ...]:
        """Whose programs it finds by their digest, which doesn't say the model."""
        return (self.owner, EVERYBODY) if self.models is None else (self.owner,)

    def check_model(self, name: str) -> None:
        """Refuses a model that it may not use, whether there is one or not.

        Raises:
          ServiceError: PERMISSION_DENIED.
        """
        if self.models is not None and name not in self.models:
            raise ServiceError(
                "",
                f"{self.name} may not use the model {name!r}",
                f"one of {', '.join(sorted(self.models))}",
                code="PERMISSION_DENIED",
                denied="model",
            )

    def its_roots(self, roots: Sequence[Path]) -> Sequence[Path]:
        """Those of the operator's roots that it may write below."""
        if self.roots is None:
            return roots
        return [root for root in roots if os.path.abspath(root) in self.roots]


def folder_of(name: str) -> str:
    """A name as that of a folder: one component, and none that means another."""
    quoted = quote(name, safe="")
    return f"%2E{quoted[1:]}" if quoted.startswith(".") else quoted


class Tokens:
    """Who may call, from a file: holders of bearer tokens and of certificates.

    Args:
      path: the file.
      roots: of checkpoints, to which its lines may restrict somebody.

    Raises:
      ServiceError: the file cannot be read, names nobody, or a root that is none.
    """

    def __init__(self, path: Path, roots: Sequence[Path] = ()):
        known = frozenset(map(os.path.abspath, roots))
        self._file = Watched([path], partial(_callers, known))

    def find(self, header: str) -> Caller | None:
        """Whose token ``authorization: header`` carries; None for nobody's."""
        self._file.refresh()
        scheme, _, token = header.partition(" ")
        given = hashlib.sha256(token.strip().encode()).digest()
        found = None
        for known, caller in self._file.value.tokens.items():
            if hmac.compare_digest(known, given):
                found = caller
        return found if scheme.lower() == "bearer" else None

    def of_certificate(self, identities: Iterable[bytes]) -> Caller | None:
        """Whose certificate it is that proved ``identities``; None for nobody's."""
        self._file.refresh()
        known = self._file.value.certificates
        return next((known[name] for name in identities if name in known), None)


class _Callers(NamedTuple):
    """Callers by the SHA-256 of their token, and by what their certificate proves."""

    tokens: dict[bytes, Caller]
    certificates: dict[bytes, Caller]


def _callers(roots: frozenset[str], contents: list[bytes]) -> _Callers:
    lines = read_tokens(contents[0])
    short = any(len(one.token) < 16 and not one.is_certificate for one in lines)
    if not lines or short:
        raise ValueError("expected tokens of 16 characters or more, one a line")
    found = _Callers({}, {})
    for one in lines:
        digest = hashlib.sha256(one.token)
        name = one.name or f"token {digest.hexdigest()[:12]}"
        folder = folder_of(one.name)
        if strange := (one.roots or frozenset()) - roots:
            text = f"{', '.join(sorted(strange))} is no --checkpoint-root"
            raise ValueError(f"roots of {name}: {text}")
        caller = Caller(
            name, one.roles, one.weight, folder, name, one.models, one.roots
        )
        if one.is_certificate:
            found.certificates[one.token] = caller
        else:
            found.tokens[digest.digest()] = caller
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

    def changed() -> Any:  # None for no change, which grpc's stubs lack
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
