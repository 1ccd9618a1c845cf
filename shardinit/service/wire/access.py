"""Access: what both sides read the same way, addresses and files of tokens.

A server refuses to listen beyond its machine without TLS, and a client refuses to send
a token there: so both must mean the same by "this machine".
"""

from __future__ import annotations

import ipaddress
from typing import NamedTuple

from shardinit.errors import ServiceError


def split_address(listen: str) -> tuple[str, int]:
    """Host and port of a listen address.

    Raises:
      ServiceError: the address is malformed.
    """
    host, colon, port = listen.rpartition(":")
    if not colon or not host or not port.isdigit() or int(port) > 65535:
        raise ServiceError(
            f"listen address {listen!r}",
            "it has no host and port",
            "such as 127.0.0.1:50051",
            code="INVALID_ARGUMENT",
        )
    return host, int(port)


def is_local(listen: str) -> bool:
    """Whether an address is one of this machine only; a Unix socket is.

    Raises:
      ServiceError: the address is malformed.
    """
    if listen.startswith("unix:"):
        return True
    host = split_address(listen)[0]
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        # No other name is resolved: what it means here need not be what gRPC finds
        # later.
        return host == "localhost"


ROLES = frozenset({"read", "upload", "write"})


_CERTIFICATE = b"cert:"


class Token(NamedTuple):
    """A line of a file of tokens.

    Attributes:
      token: the token; of a certificate, the identity that it proves.
      name: whose it is; empty if the line does not say.
      roles: what its holder may do.
      weight: its share of the workers, against that of others.
      is_certificate: whether the line is of a certificate.
      models: the registered models that it may use; None for all.
      roots: the roots of checkpoints that it may write below; None for all.
    """

    token: bytes
    name: str = ""
    roles: frozenset[str] = ROLES
    weight: int = 1
    is_certificate: bool = False
    models: frozenset[str] | None = None
    roots: frozenset[str] | None = None


def read_tokens(content: bytes) -> list[Token]:
    """The tokens of a file, one a line: ``TOKEN``, or ``NAME ROLES TOKEN [WEIGHT]``.

    Roles are joined by commas; a token alone has all of them. ``cert:IDENTITY`` in the
    place of a token is whoever has a certificate of that name. Behind all this may
    stand ``models=A,B`` and ``roots=/A,/B``: those alone. Empty lines and those with #
    are skipped.

    Raises:
      ValueError: a line is neither, or has a role that there is not.

    Example:
      >>> read_tokens(b"trainer read,write a-token-of-many-letters")[0].name
      'trainer'
    """
    found = []
    for number, line in enumerate(content.splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith(b"#"):
            continue
        only = _only(words)
        one = _token(words)
        if one is None or not all(only.values()):
            known = ", ".join(sorted(ROLES))
            raise ValueError(
                f"line {number}: expected TOKEN, or NAME ROLES TOKEN [WEIGHT] with "
                f"roles of {known} and a weight of 1 to 1000, and behind it "
                "models=A,B and roots=/A,/B or not"
            )
        found.append(one._replace(**only))
    return found


def _only(words: list[bytes]) -> dict[str, frozenset[str]]:
    """What a token is restricted to, which is taken from the end of its line."""
    found: dict[str, frozenset[str]] = {}
    while len(words) > 1 and words[-1].startswith((b"models=", b"roots=")):
        name, _, listed = words.pop().decode(errors="replace").partition("=")
        found[name] = frozenset(listed.split(",")) - {""}
    return found


def _token(words: list[bytes]) -> Token | None:
    """The token of a line; None if it is wrong."""
    if len(words) == 1 and not words[0].startswith(_CERTIFICATE):
        return Token(words[0])
    if len(words) not in (3, 4):
        return None
    name, listed, token, *rest = words
    roles = frozenset(listed.decode(errors="replace").split(","))
    weight = int(rest[0]) if rest and rest[0].isdigit() else 1 - len(rest)
    if not roles <= ROLES or not 1 <= weight <= 1000:
        return None
    is_certificate = token.startswith(_CERTIFICATE)
    token = token.removeprefix(_CERTIFICATE) if is_certificate else token
    return Token(token, name.decode(errors="replace"), roles, weight, is_certificate)
