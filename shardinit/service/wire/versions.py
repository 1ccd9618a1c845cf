"""Versions: what a client and a server must agree on before they do anything.

Two numbers matter: that of the protocol, and that of JAX, since a program runs on its
producer's JAX or a newer one and never on an older.
"""

from __future__ import annotations

import functools
from importlib import metadata

from shardinit.errors import ServiceError
from shardinit.v1 import service_pb2
from shardinit.version import __version__, release

SERVICE = service_pb2.DESCRIPTOR.services_by_name["InitService"].full_name
PROTOCOL = 1


@functools.cache
def jax_version() -> str:
    """Version of the installed JAX, without importing it; empty if there is none."""
    try:
        return metadata.version("jax")
    except metadata.PackageNotFoundError:
        return ""


def negotiate(
    request: service_pb2.GetVersionRequest,
) -> service_pb2.GetVersionResponse:
    """The newest protocol version that both sides speak.

    Raises:
      ServiceError: there is none.
    """
    if not request.min <= PROTOCOL <= request.max:
        raise ServiceError(
            "protocol version",
            f"the client speaks {request.min} to {request.max}",
            f"{PROTOCOL}",
            "Use a client and a server of the same release",
            code="FAILED_PRECONDITION",
        )
    return service_pb2.GetVersionResponse(
        version=PROTOCOL,
        server_version=__version__,
        jax_version=jax_version(),
    )


def check_jax(client: str, producer: str) -> None:
    """Refuses a client whose JAX would not run the producer's programs.

    Args:
      client: the version that will run them; empty if they are not run.
      producer: the version that makes them.

    Raises:
      ServiceError: the client's is older.
    """
    if client and release(client) < release(producer):
        raise ServiceError(
            "JAX version",
            f"the client has {client}, the program is made by {producer}",
            "a client's JAX that is not older than the program's",
            f"Install jax>={producer} in the client, ask for the bytes instead "
            f'(via="stream"), or serve with an older JAX',
            code="FAILED_PRECONDITION",
        )
