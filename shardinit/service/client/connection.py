"""Connection: one channel to a service, and what every call through it has in common.

A call carries a request id and, if there is one, a token; it has a deadline; it is
tried again where nothing has been answered yet (gRPC's own retries, by service
config); its failure is one exception with one line. A target of several addresses is
used in turns, so that replicas share the hosts of a job.

A token is sent over TLS, or to this very machine, and nowhere else.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message import Message
from grpc.experimental import ChannelOptions

from shardinit.errors import ArgumentError, ServiceError
from shardinit.service.client.retrying import attempts
from shardinit.service.wire.access import is_local, read_tokens
from shardinit.service.wire.errors import REQUEST_ID, from_rpc_error
from shardinit.service.wire.limits import DEFAULTS
from shardinit.service.wire.service_pb2_grpc import InitServiceStub
from shardinit.service.wire.versions import PROTOCOL, SERVICE
from shardinit.v1 import service_pb2

_SERVICE_CONFIG = {
    "loadBalancingConfig": [{"round_robin": {}}],
    "methodConfig": [
        {
            "name": [{"service": SERVICE}],
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.1s",
                "maxBackoff": "2s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ],
}


PORT = 50051  # of a server that was told none

# A name, or an address in brackets, which gRPC would take for port 443.
_PORTLESS = re.compile(r"(dns:(//[^/]*/)?)?(\[[^\]]*\]|[^:/\[\],]+)")


def check_target(target: object, timeout: object) -> None:
    """Refuses what is no address, and no time to wait.

    Raises:
      ArgumentError: it is none.
    """
    if not isinstance(target, str) or not target.strip():
        raise ArgumentError(
            "target", f"got {target!r}", "host:port, such as 'localhost:50051'"
        )
    if target.startswith(("http://", "https://")):
        raise ArgumentError(
            "target",
            f"got {target!r}",
            "host:port",
            f"Write {target.split('//')[1].rstrip('/')!r}"
            + (", with tls=True" if target.startswith("https") else ""),
        )
    if _PORTLESS.fullmatch(target):
        raise ArgumentError(
            "target",
            f"got {target!r}, which has no port",
            "host:port",
            f"Write '{target}:{PORT}' if it is the usual one",
        )
    if not isinstance(timeout, int | float) or not timeout > 0:
        raise ArgumentError("timeout", f"got {timeout!r}", "seconds, more than 0")


@dataclass(frozen=True)
class Credentials:
    """How a client shows itself and knows the server.

    Attributes:
      tls: whether to encrypt; also on when any of the next three is given.
      ca: file with the authorities that sign servers (PEM); None for gRPC's own.
      cert: file with the client's certificate chain (PEM), with ``key``.
      key: file with its private key (PEM).
      token: a bearer token, or the path of a file with one, which is read at every
        call so that it may be replaced.
      insecure: send the token without TLS to another machine too.
    """

    tls: bool = False
    ca: str | os.PathLike[str] | None = None
    cert: str | os.PathLike[str] | None = None
    key: str | os.PathLike[str] | None = None
    token: str | os.PathLike[str] | None = None
    insecure: bool = False

    def __post_init__(self) -> None:
        for name in ("ca", "cert", "key"):
            if (file := getattr(self, name)) is not None:
                ArgumentError.check_path(name, file)

    def channel(
        self, target: str, options: Sequence[tuple[str, str | int]]
    ) -> grpc.Channel:
        """Opens the channel.

        Raises:
          ServiceError: a file cannot be read, or the token would travel in clear.
        """
        files = (self.ca, self.key, self.cert)
        if not self.tls and files == (None, None, None):
            if self.token is not None and not self.insecure and not _local(target):
                raise ServiceError(
                    target,
                    "a token would be sent without TLS",
                    "tls=True or ca=..., or a server on this machine",
                    "insecure=True if something on the way encrypts",
                    code="FAILED_PRECONDITION",
                )
            return grpc.insecure_channel(target, options)
        made = grpc.ssl_channel_credentials(*map(_content, files))
        return grpc.secure_channel(target, made, options)

    def header(self) -> tuple[tuple[str, str], ...]:
        """The metadata that carries the token."""
        if self.token is None:
            return ()
        token = self.token
        if not isinstance(token, str):
            try:
                found = read_tokens(_content(token) or b"")
            except ValueError as error:
                text = "a file with a token"
                raise ServiceError(
                    str(token), str(error), text, code="FAILED_PRECONDITION"
                ) from error
            bearers = [one for one in found if not one.is_certificate]
            token = bearers[0].token.decode() if bearers else ""
        return (("authorization", f"Bearer {token.strip()}"),)


def _content(path: str | os.PathLike[str] | None) -> bytes | None:
    if path is None:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ServiceError(
            str(path),
            error.strerror or str(error),
            "a file that can be read",
            code="FAILED_PRECONDITION",
        ) from error


def _local(target: str) -> bool:
    """Whether all addresses of a target are of this machine."""
    for scheme in ("ipv4:", "ipv6:", "dns:"):
        target = target.removeprefix(scheme)
    try:
        return all(is_local(part.lstrip("/")) for part in target.split(","))
    except ServiceError:
        return False


class Connection:
    """Calls of one service; safe to use from several threads.

    Args:
      target: what gRPC resolves.
      timeout: seconds that each call may take; a stream, between signs of life.
      credentials: how to connect.

    Attributes:
      target, timeout: as given.
    """

    def __init__(self, target: str, timeout: float, credentials: Credentials):
        self.target = target
        self.timeout = timeout
        self._credentials = credentials
        self._lock = threading.Lock()
        self._negotiated = False
        self._closed = False
        options = (
            ("grpc.enable_retries", 1),
            ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
            # gRPC's own limit is 4 MiB for what is received and none for what is sent:
            # https://github.com/grpc/grpc/blob/v1.64.x/include/grpc/impl/channel_arg_names.h
            ("grpc.max_receive_message_length", DEFAULTS.response_bytes),
            ("grpc.max_send_message_length", DEFAULTS.request_bytes),
            ("grpc.keepalive_time_ms", 30_000),  # a server that is gone is noticed
            ("grpc.keepalive_timeout_ms", 10_000),
            # By default waits grow to two minutes, and a server that is back is unused:
            # https://github.com/grpc/grpc/blob/master/doc/connection-backoff.md
            ("grpc.initial_reconnect_backoff_ms", 200),
            ("grpc.min_reconnect_backoff_ms", 200),
            ("grpc.max_reconnect_backoff_ms", 2_000),
            # Whoever reads a stream also polls for it. Else another thread does, which
            # hands each message over: https://github.com/grpc/grpc/pull/20753
            (ChannelOptions.SingleThreadedUnaryStream, 1),
            # A chunk comes as one frame: in frames of 16 KiB, as by default, both sides
            # take a sixth more processor time a byte (1.85).
            ("grpc.http2.max_frame_size", DEFAULTS.chunk_bytes),
        )
        self._channel = credentials.channel(target, options)
        self._stub = InitServiceStub(self._channel)

    def call(self, name: str, request: Message | Callable[[], Any]) -> Any:
        """The answer of a call that has one.

        Args:
          name: of the call.
          request: its request; of a stream, what makes its messages for each attempt.

        Raises:
          SpecError: the request has faults.
          ServiceError: anything else.
        """
        self._negotiate()
        made = request if callable(request) else lambda: request
        # gRPC sends a stream of the caller's again only while it has kept all of it, by
        # default 256 KiB:
        # https://github.com/grpc/grpc/blob/v1.64.x/include/grpc/impl/channel_arg_names.h
        codes = ("UNAVAILABLE",) if callable(request) else ()
        end = time.monotonic() + self.timeout
        again = attempts(codes, seconds=self.timeout)
        return again(lambda: self._call(name, made(), end - time.monotonic()))

    @contextmanager
    def stream(
        self,
        name: str,
        request: Message,
        *,
        endless: bool = False,
        read: Callable[[bytes], Any] | None = None,
    ) -> Iterator[Iterator[Any]]:
        """The answers of a call that has several; it is cancelled at the block's end.

        Args:
          name: of the call.
          request: its request.
          endless: without a deadline; a server that is gone is noticed all the same.
          read: makes an answer of its bytes; default what protobuf makes of them.

        Raises:
          SpecError: the request has faults.
          ServiceError: anything else.
        """
        self._negotiate()
        with self._translated(name):
            method = getattr(self._stub, name)
            if read is not None:
                method = self._channel.unary_stream(
                    f"/{SERVICE}/{name}",
                    request_serializer=type(request).SerializeToString,
                    response_deserializer=read,
                )
            timeout = None if endless else self.timeout
            answers = method(request, timeout=timeout, metadata=self._metadata())
            try:
                yield answers
            # A stream that nobody reads on would keep its place at the server until the
            # deadline.
            finally:
                answers.cancel()  # does nothing to a stream that has ended

    def close(self) -> None:
        """Ends all calls; a second time does nothing."""
        self._closed = True
        self._channel.close()

    def _negotiate(self) -> None:
        """Agrees on the protocol's version, once."""
        if self._closed:
            raise ServiceError(self.target, "the client is closed", code="CANCELLED")
        with self._lock:
            if not self._negotiated:
                request = service_pb2.GetVersionRequest(min=PROTOCOL, max=PROTOCOL)
                self._call("GetVersion", request)
                self._negotiated = True

    def _call(
        self,
        name: str,
        request: Message | Iterator[Message],
        seconds: float | None = None,
    ) -> Any:
        # A stub without a timeout waits without end.
        timeout = self.timeout if seconds is None else max(seconds, 0.0)
        with self._translated(name):
            method = getattr(self._stub, name)
            return method(request, timeout=timeout, metadata=self._metadata())

    def _metadata(self) -> tuple[tuple[str, str], ...]:
        return ((REQUEST_ID, uuid.uuid4().hex), *self._credentials.header())

    @contextmanager
    def _translated(self, name: str) -> Iterator[None]:
        try:
            yield
        except grpc.RpcError as error:
            raise from_rpc_error(error, f"{name} from {self.target}") from error
        except ValueError as error:  # grpc's word for a channel that was closed
            if not self._closed:
                raise
            where = f"{name} from {self.target}"
            text = "the client is closed"
            raise ServiceError(where, text, code="CANCELLED") from error
