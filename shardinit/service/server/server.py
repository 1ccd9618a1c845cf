"""Server: the init service on its ports, from the start to an orderly end.

Calls are synchronous and run in threads: the work is JAX's tracing and XLA's loops,
which no event loop would speed up. Beside the service itself stand the standard ones
that operators' tools expect: health, reflection and channelz.
Health has threads of its own, so that a probe is answered while all others are busy.

The end is in three steps: health says NOT_SERVING and no new call is taken; calls that
run get the time they were promised; what still runs shortly before that is handed
back, so that clients go on elsewhere from where they were.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

import grpc
from grpc_channelz.v1 import channelz, channelz_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from shardinit.errors import ServiceError
from shardinit.service.server import auth
from shardinit.service.server.boundary import Boundary, Pool
from shardinit.service.server.config import Config
from shardinit.service.server.servicer import Servicer
from shardinit.service.server.telemetry import Metrics
from shardinit.service.wire.access import split_address
from shardinit.service.wire.service_pb2_grpc import add_InitServiceServicer_to_server
from shardinit.service.wire.versions import SERVICE

log = logging.getLogger("shardinit.service")

_HAND_BACK = 0.2  # part of the grace that is left to say goodbye


class Server:
    """An init service on one address; also a context manager that runs it.

    Args:
      config: how to serve.
      servicer: answers the calls; default a `Servicer` of this config.

    Attributes:
      address: where it listens, with the port that was taken.
      health_address, metrics_address: the same of the other ports; None without.
      metrics: its figures.

    Raises:
      ServiceError: the config is unsafe or contradicts itself, a file cannot be read,
        or an address is in use.
    """

    def __init__(
        self, config: Config | None = None, *, servicer: Servicer | None = None
    ):
        config = config or Config()
        config.check()
        tokens = auth.Tokens(config.token_file) if config.token_file else None
        credentials = auth.server_credentials(config)
        self.metrics = Metrics()
        self._servicer = servicer or Servicer(config, self.metrics)
        boundary = Boundary(config, self.metrics)
        probes = Pool(2, "health")
        self._pools = (boundary.short, boundary.long, boundary.spare, probes)
        access = [auth.Access(tokens, boundary.spare)] if tokens else []
        self._server = grpc.server(
            boundary.short,
            interceptors=[*access, boundary],
            options=(
                # Else a second server on the port starts without an error, and each
                # gets some of the calls: https://github.com/grpc/grpc/issues/16920
                ("grpc.so_reuseport", 0),
                ("grpc.max_receive_message_length", config.limits.request_bytes),
                ("grpc.max_send_message_length", config.limits.response_bytes),
                ("grpc.keepalive_time_ms", 60_000),  # a client that is gone is noticed
                # A client pings every 30 s. By default that may be done every 5 minutes
                # and hardly between calls; else the connection is ended, as
                # "too_many_pings": https://github.com/grpc/grpc/issues/33661
                ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
                ("grpc.keepalive_permit_without_calls", 1),
            ),
        )
        self._health = _Health(probes)
        add_InitServiceServicer_to_server(self._servicer, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        channelz.add_channelz_servicer(self._server)
        channels = channelz_pb2.DESCRIPTOR.services_by_name["Channelz"].full_name
        names = [SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME, channels]
        reflection.enable_server_reflection(names, self._server)
        self._names = ("", *names)
        self._say(health_pb2.HealthCheckResponse.NOT_SERVING)
        self._probes: grpc.Server | None = None
        self.health_address: str | None = None
        self.metrics_address: str | None = None
        self._stop_metrics: Callable[[], None] = lambda: None
        try:
            self.address = _bind(self._server, config.listen, credentials)
            if config.health_listen is not None:
                self._probes = grpc.server(probes, options=(("grpc.so_reuseport", 0),))
                health_pb2_grpc.add_HealthServicer_to_server(self._health, self._probes)
                self.health_address = _bind(self._probes, config.health_listen, None)
            if config.metrics_listen is not None:
                exported = self.metrics.serve(config.metrics_listen)
                self.metrics_address, self._stop_metrics = exported
        except ServiceError:
            for server in filter(None, (self._server, self._probes)):
                # A port is bound when it is added, and only a server that ran gives it
                # back: https://github.com/grpc/grpc/pull/31232 says so of C#'s.
                server.start()
                server.stop(None).wait()
            self._close()
            raise

    def start(self) -> None:
        """Begins to serve; returns at once."""
        self._server.start()
        if self._probes is not None:
            self._probes.start()
        self._say(health_pb2.HealthCheckResponse.SERVING)

    def stop(self, grace: float = 30.0) -> None:
        """Says NOT_SERVING, takes no new call, and lets running ones finish.

        Args:
          grace: seconds that calls get; a part of it before the end, streams and
            writes that still run are handed back.
        """
        self._health.enter_graceful_shutdown()
        ended = self._server.stop(grace)
        if not ended.wait(grace * (1 - _HAND_BACK)):
            self._servicer.hand_back()
        ended.wait()
        self._servicer.hand_back()  # nothing that was detached outlives its server
        if self._probes is not None:
            self._probes.stop(0).wait()
        self._close()

    def _say(self, status: int) -> None:
        for name in self._names:
            self._health.set(name, status)

    def _close(self) -> None:
        self._stop_metrics()
        for pool in self._pools:
            pool.shutdown(wait=False, cancel_futures=True)

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop(grace=1.0)


class _Health(health.HealthServicer):
    """The standard health service, on threads of its own.

    gRPC looks for the thread pool on the function that answers. A method belongs to
    the class, and so to every server of the process; hence functions of the instance.
    """

    def __init__(self, pool: Pool):
        super().__init__()
        for name in ("Check", "Watch"):
            method: Any = partial(getattr(health.HealthServicer, name), self)
            method.experimental_thread_pool = pool
            method.experimental_non_blocking = name == "Watch"
            setattr(self, name, method)


def _bind(
    server: grpc.Server, listen: str, credentials: grpc.ServerCredentials | None
) -> str:
    """Takes the port; returns the address with its number."""
    try:
        if credentials is None:
            port = server.add_insecure_port(listen)
        else:
            port = server.add_secure_port(listen, credentials)
    except RuntimeError as error:
        raise ServiceError(
            f"listen address {listen!r}",
            "it cannot be bound",
            "a free port of this machine",
            "Port 0 takes a free one",
            code="UNAVAILABLE",
        ) from error
    return (
        listen if listen.startswith("unix:") else f"{split_address(listen)[0]}:{port}"
    )


def serve(
    config: Config,
    *,
    announce: Callable[[Server], None] = lambda server: None,
    grace: float = 30.0,
) -> None:
    """Serves until SIGTERM or SIGINT, then drains; a second signal ends it at once.

    Call it from the main thread.

    Args:
      config: how to serve.
      announce: called with the server once calls are answered.
      grace: seconds that running calls get to finish.

    Raises:
      ServiceError: as for `Server`.
    """
    asked, again = threading.Event(), threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        (again if asked.is_set() else asked).set()

    server = Server(config)
    previous = {s: signal.signal(s, on_signal) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        server.start()
        announce(server)
        # A signal may reach another thread; this one then learns of it when it wakes.
        while not asked.wait(0.5):
            pass
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
