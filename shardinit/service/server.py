"""Server: the init service on a port, from its start to an orderly end.

Calls are synchronous and run in threads: the work is JAX's tracing, which no event
loop would speed up. Beside the service itself stand the standard ones that operators'
tools expect: health, reflection, and channelz where it is installed. Health has a
thread of its own, so that a probe is answered while every other thread is busy.

This version has neither TLS nor authentication, so it listens on this machine only.
"""

from __future__ import annotations

import ipaddress
import logging
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from shardinit.errors import ServiceError
from shardinit.service.boundary import Boundary
from shardinit.service.limits import Limits
from shardinit.service.service_pb2_grpc import add_InitServiceServicer_to_server
from shardinit.service.servicer import Servicer
from shardinit.v1 import service_pb2

log = logging.getLogger("shardinit.service")

SERVICE = service_pb2.DESCRIPTOR.services_by_name["InitService"].full_name


class Server:
    """An init service on one address; also a context manager that runs it.

    Args:
      listen: ``host:port`` on this machine, or ``unix:/path``; port 0 takes a free one.
      limits: caps on requests.
      workers: threads that answer calls.
      cache_bytes: bound on what is kept of programs, and again of descriptions.
      servicer: answers the calls; default a `Servicer` with these limits.

    Attributes:
      address: where it listens, with the port that was taken.

    Raises:
      ServiceError: the address is not on this machine, malformed, or in use.
    """

    def __init__(
        self,
        listen: str = "127.0.0.1:0",
        *,
        limits: Limits | None = None,
        workers: int = 16,
        cache_bytes: int = 256 << 20,
        servicer: Any = None,
    ):
        host = check_listen(listen)
        limits = limits or Limits()
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="shardinit-rpc")
        self._health_pool = ThreadPoolExecutor(2, thread_name_prefix="shardinit-health")
        self._server = grpc.server(
            self._pool,
            interceptors=[Boundary(SERVICE)],
            options=(
                ("grpc.so_reuseport", 0),  # a port in use is an error, not a share
                ("grpc.max_receive_message_length", limits.request_bytes),
                ("grpc.max_send_message_length", limits.response_bytes),
            ),
        )
        self._health = _Health(self._health_pool)
        add_InitServiceServicer_to_server(
            servicer or Servicer(limits, cache_bytes), self._server
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = [SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME]
        names += _add_channelz(self._server)
        reflection.enable_server_reflection(names, self._server)
        for name in ("", *names):
            self._health.set(name, health_pb2.HealthCheckResponse.NOT_SERVING)
        self._names = names
        try:
            port = self._server.add_insecure_port(listen)
        except RuntimeError as error:
            self._close_pools()
            raise ServiceError(
                f"listen address {listen!r}",
                "it cannot be bound",
                "a free port of this machine",
                "Port 0 takes a free one",
                code="UNAVAILABLE",
            ) from error
        self.address = listen if host is None else f"{host}:{port}"

    def start(self) -> None:
        """Begins to serve; returns at once."""
        self._server.start()
        for name in ("", *self._names):
            self._health.set(name, health_pb2.HealthCheckResponse.SERVING)

    def stop(self, grace: float = 30.0) -> None:
        """Says NOT_SERVING, takes no new call, and lets running ones finish.

        Args:
          grace: seconds after which running calls are cancelled.
        """
        self._health.enter_graceful_shutdown()
        self._server.stop(grace).wait()
        self._close_pools()

    def _close_pools(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._health_pool.shutdown(wait=False, cancel_futures=True)

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop(grace=1.0)


class _Health(health.HealthServicer):
    """The standard health service, on threads of its own.

    gRPC looks for the thread pool on the function that answers. A method belongs to
    the class, and so to every server of the process; hence functions of the instance.
    """

    def __init__(self, pool: ThreadPoolExecutor):
        super().__init__()
        methods = health.HealthServicer

        def check(request: Any, context: Any) -> Any:
            return methods.Check(self, request, context)

        def watch(
            request: Any, context: Any, send_response_callback: Any = None
        ) -> Any:
            return methods.Watch(self, request, context, send_response_callback)

        check.experimental_thread_pool = pool  # type: ignore[attr-defined]
        watch.experimental_thread_pool = pool  # type: ignore[attr-defined]
        watch.experimental_non_blocking = True  # type: ignore[attr-defined]
        self.Check = check
        self.Watch = watch  # type: ignore[assignment]


def _add_channelz(server: grpc.Server) -> list[str]:
    try:
        from grpc_channelz.v1 import channelz, channelz_pb2
    except ImportError:  # an optional package
        return []
    channelz.add_channelz_servicer(server)
    return [channelz_pb2.DESCRIPTOR.services_by_name["Channelz"].full_name]


def check_listen(listen: str) -> str | None:
    """The host of a listen address on this machine; None for a Unix socket.

    Raises:
      ServiceError: the address is malformed, or reachable from other machines.
    """
    if listen.startswith("unix:"):
        return None
    host, colon, port = listen.rpartition(":")
    if not colon or not host or not port.isdigit() or int(port) > 65535:
        raise ServiceError(
            f"listen address {listen!r}",
            "it has no host and port",
            "such as 127.0.0.1:50051",
            code="INVALID_ARGUMENT",
        )
    try:
        loopback = ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        loopback = host == "localhost"
    if not loopback:
        raise ServiceError(
            f"listen address {listen!r}",
            "it can be reached from other machines, and this version has neither TLS "
            "nor authentication",
            "an address of this machine only: 127.0.0.1, [::1] or localhost",
            "To reach it from elsewhere, put a proxy with TLS in front of it",
            code="FAILED_PRECONDITION",
        )
    return host


def serve(
    listen: str,
    *,
    announce: Callable[[str], None] = lambda address: None,
    grace: float = 30.0,
    limits: Limits | None = None,
) -> None:
    """Serves until SIGTERM or SIGINT, then drains; a second signal ends it at once.

    Call it from the main thread.

    Args:
      listen: the address, see `Server`.
      announce: called with the address once calls are answered.
      grace: seconds that running calls get to finish.
      limits: caps on requests.

    Raises:
      ServiceError: the address cannot be used.
    """
    asked, again = threading.Event(), threading.Event()

    def on_signal(number: int, frame: Any) -> None:
        (again if asked.is_set() else asked).set()

    server = Server(listen, limits=limits)
    previous = {s: signal.signal(s, on_signal) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        server.start()
        announce(server.address)
        asked.wait()
        log.info("draining, %.0f s at most", grace)
        drain = threading.Thread(target=server.stop, args=(grace,), daemon=True)
        drain.start()
        while drain.is_alive() and not again.is_set():
            drain.join(0.05)
        if again.is_set():
            server.stop(0)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
