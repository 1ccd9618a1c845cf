"""Access: what both sides read the same way, addresses and files of tokens.

A server refuses to listen beyond its machine without TLS, and a client refuses to send
a token there: so both must mean the same by "this machine".
"""

from __future__ import annotations

import ipaddress

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
        return host == "localhost"


def read_tokens(content: bytes) -> list[bytes]:
    """The tokens of a file: one a line; empty lines and those with # are skipped."""
    lines = [line.strip() for line in content.splitlines()]
    return [line for line in lines if line and not line.startswith(b"#")]
