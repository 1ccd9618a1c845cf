"""Server: the init service on its ports, from the start to an orderly end.

What listens is one event loop of gRPC's, on a thread of its own: it answers at once or
waits, and whatever takes time is done by workers (``pool``). Beside the service itself
stand the standard ones that operators' tools expect: health, reflection and channelz.

The end is in three steps: health says NOT_SERVING and no new call is taken; calls that
run get the time they were promised; what still runs shortly before that is handed
back, so that clients go on elsewhere from where they were.
"""

from __future__ import annotations

import asyncio
import atexit
import functools
import logging
import signal
import socket
import sys
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import replace
from types import FrameType
from typing import Any, TypeVar

import grpc
from grpc import aio
from grpc_channelz.v1 import channelz, channelz_pb2
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from shardinit.errors import ServiceError
from shardinit.service.server import auth
from shardinit.service.server.boundary import Boundary
from shardinit.service.server.config import Config
from shardinit.service.server.front import Front
from shardinit.service.server.health import Health
from shardinit.service.server.heap import keep_trimmed, use_few_arenas
from shardinit.service.server.objects import Objects
from shardinit.service.server.pool import Pool
from shardinit.service.server.store import Store
from shardinit.service.server.telemetry import Metrics
from shardinit.service.wire.access import split_address
from shardinit.service.wire.errors import Refusal
from shardinit.service.wire.versions import SERVICE

log = logging.getLogger("shardinit.service")

Result = TypeVar("Result")
Make = Callable[[Config, Metrics, Pool, Store], Front]

_PENDING = 10_000  # calls that have come and that the event loop has not taken up
_MOST_MS = (1 << 31) - 2  # gRPC's options are ints
_SWITCH = 0.0005  # seconds between two threads that compute
_HAND_BACK = 0.2  # part of the grace that is left to say goodbye
_CHANNELZ = channelz_pb2.DESCRIPTOR.services_by_name["Channelz"].full_name
_NAMES = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME, _CHANNELZ)


class Server:
    """An init service on one address; also a context manager that runs it.

    Args:
      config: how to serve.
      front: makes what answers the calls; default `Front`.

    Attributes:
      address: where it listens, with the port that was taken.
      health_address, metrics_address: the same of the other ports; None without.
      metrics: its figures.

    Raises:
      ServiceError: the config is unsafe or contradicts itself, a file cannot be read,
        or an address is in use.
    """

    def __init__(self, config: Config | None = None, *, front: Make = Front):
        config = config or Config()
        config.check()
        _refuse_live_socket(config.listen)  # before gRPC is up, which ends with a trace
        roots = config.checkpoint_roots
        tokens = auth.Tokens(config.token_file, roots) if config.token_file else None
        credentials = auth.server_credentials(config)
        objects = Objects(config.objects) if config.objects is not None else None
        self.metrics = Metrics()
        evicted = self.metrics.evicted.inc
        self._store = Store(config.store, config.cache_bytes, objects, evicted)
        self._config = replace(config, store=self._store.folder)
        self.address = config.listen
        self.health_address: str | None = None
        self.metrics_address: str | None = None
        self._stop_metrics: Callable[[], None] = lambda: None
        self._pool: Pool | None = None
        self._ended = False
        self._saying: asyncio.Future[None] | None = None
        _run(self._open(tokens, front))
        try:
            self.address = _run(_bind(self._server, config.listen, credentials))
            if config.health_listen is not None:
                bound = _run(_bind(self._probes, config.health_listen, None))
                self.health_address = bound
            if config.metrics_listen is not None:
                exported = self.metrics.serve(config.metrics_listen)
                self.metrics_address, self._stop_metrics = exported
        except ServiceError:
            _run(self._abandon())
            raise

    def start(self) -> None:
        """Begins to serve; returns at once, while the first worker gets ready."""
        _run(self._start())

    def wait_ready(self) -> None:
        """Returns when a worker is up.

        Raises:
          ServiceError: it cannot begin.
        """
        if self._pool is not None:
            with suppress(Refusal):
                _run(_result(self._pool.models))
        self.check_workers()

    def check_workers(self) -> None:
        """Says why no worker can begin, if that is so.

        Raises:
          ServiceError: it is so.
        """
        models = self._pool.models if self._pool is not None else None
        error = models.exception() if models is not None and models.done() else None
        if error is not None:
            raise ServiceError("worker", str(error), code="FAILED_PRECONDITION")

    def stop(self, grace: float = 30.0) -> None:
        """Says NOT_SERVING, takes no new call, and lets running ones finish.

        Args:
          grace: seconds that calls get; a part of it before the end, streams and
            writes that still run are handed back.
        """
        _run(self._stop(grace))
        self._stop_metrics()
        self._store.close()

    async def _open(self, tokens: auth.Tokens | None, front: Make) -> None:
        """Makes what needs an event loop."""
        boundary = self._boundary = Boundary(self._config, self.metrics, tokens)
        self._server = aio.server(
            interceptors=[boundary],
            options=(
                # Else a second server on the port starts without an error, and each
                # gets some of the calls: https://github.com/grpc/grpc/issues/16920
                ("grpc.so_reuseport", 0),
                ("grpc.max_concurrent_streams", self._config.connection_calls),
                # Else gRPC (1.85) cancels, at random and without a word, some of the
                # calls beyond a thousand that come at one moment.
                ("grpc.server.max_pending_requests", _PENDING),
                ("grpc.server.max_pending_requests_hard_limit", 2 * _PENDING),
                ("grpc.max_receive_message_length", self._config.limits.request_bytes),
                ("grpc.max_send_message_length", self._config.limits.response_bytes),
                ("grpc.keepalive_time_ms", 60_000),  # a client that is gone is noticed
                # A client pings every 30 s. By default that may be done every 5 minutes
                # and hardly between calls; else the connection is ended, as
                # "too_many_pings": https://github.com/grpc/grpc/issues/33661
                (
                    "grpc.http2.min_ping_interval_without_data_ms",
                    round(self._config.ping_seconds * 1000),
                ),
                ("grpc.max_connection_idle_ms", _ms(self._config.idle_seconds)),
                # Calls that run go on; the client opens another for the next.
                ("grpc.max_connection_age_ms", _ms(self._config.connection_seconds)),
                ("grpc.keepalive_permit_without_calls", 1),
            ),
        )
        self._probes = aio.server(
            interceptors=[Boundary(self._config, self.metrics)],
            options=(("grpc.so_reuseport", 0),),
        )
        self._health = Health()
        for server in (self._server, self._probes):
            health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        channelz.add_channelz_servicer(self._server)
        reflection.enable_server_reflection(_NAMES, self._server)
        self._make = front

    async def _start(self) -> None:
        pool = self._pool = Pool(self._config, self.metrics)
        self._trimming = asyncio.create_task(keep_trimmed())
        self._front = self._make(self._config, self.metrics, pool, self._store)
        # Registered calls wait to be taken up in a queue each; generic ones are all in
        # one, and GetVersion behind a thousand streams that come at a moment (1.85).
        server: Any = self._server  # the stubs do not know it
        server.add_registered_method_handlers(SERVICE, self._front.handlers())
        for name in ("", *_NAMES):
            await self._health.say(name, name != SERVICE)

        def changed() -> None:
            self._saying = asyncio.ensure_future(self._health.say(SERVICE, pool.up))

        pool.on_change = changed
        await self._server.start()
        if self.health_address is not None:
            await self._probes.start()

    async def _stop(self, grace: float) -> None:
        if self._ended or self._pool is None:
            return
        await self._health.end()
        ended = asyncio.ensure_future(self._server.stop(grace))
        await asyncio.wait((ended,), timeout=grace * (1 - _HAND_BACK))
        self._front.hand_back()
        await ended
        await self._front.close()  # nothing that was detached outlives its server
        await self._pool.close()
        self._trimming.cancel()
        await self._probes.stop(0)
        self._ended = True

    async def _abandon(self) -> None:
        """Gives back what was bound."""
        for server in (self._server, self._probes):
            # A port is bound when it is added, and only a server that ran gives it
            # back: https://github.com/grpc/grpc/pull/31232 says so of C#'s.
            await server.start()
            await server.stop(None)
        self._store.close()

    def __enter__(self) -> Server:
        self.start()
        try:
            self.wait_ready()
        except ServiceError:
            self.stop(grace=0)
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.stop(grace=1.0)


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    """The event loop of all servers of this process.

    One for all, since grpcio wakes every loop for the calls of each
    (https://github.com/grpc/grpc/issues/25364). Its thread lives as long as the
    process: Linux ends a worker with the thread that started it.
    """
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="shardinit", daemon=True)
    thread.start()

    def end() -> None:  # else it runs on while the interpreter is taken down
        loop.call_soon_threadsafe(loop.stop)
        thread.join()

    atexit.register(end)
    return loop


def _run(coroutine: Coroutine[object, object, Result]) -> Result:
    """The result of what runs in the loop; for any other thread."""
    return asyncio.run_coroutine_threadsafe(coroutine, _loop()).result()


async def _result(future: asyncio.Future[Result]) -> Result:
    return await asyncio.shield(future)


def _refuse_live_socket(listen: str) -> None:
    """Leaves a Unix socket alone that somebody listens on; gRPC would take it over.

    Raises:
      ServiceError: somebody does.
    """
    if not listen.startswith("unix:"):
        return
    path = listen.removeprefix("unix:")
    path = path.removeprefix("//") if path.startswith("///") else path
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(path)
        except OSError:
            return  # nobody there, or no socket at all: gRPC says so
    raise ServiceError(
        f"listen address {listen!r}",
        "another server listens on this socket",
        "a socket of its own",
        "Stop the other server, or choose another path",
        code="UNAVAILABLE",
    )


def _ms(seconds: float) -> int:
    return min(round(seconds * 1000), _MOST_MS)


async def _bind(
    server: aio.Server, listen: str, credentials: grpc.ServerCredentials | None
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
      ServiceError: as for `Server`, or no worker can begin.
    """
    # A thread that computes holds up every answer by this, at each step of it: 5 ms by
    # default, which adds up to a second where requests of a megabyte are read.
    sys.setswitchinterval(_SWITCH)
    use_few_arenas()
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
            server.check_workers()
        log.info("draining, %.0f s at most", grace)
        drain = threading.Thread(target=server.stop, args=(grace,), daemon=True)
        drain.start()
        while drain.is_alive() and not again.is_set():
            drain.join(0.05)
        if again.is_set():
            server.stop(0)
    except ServiceError:
        server.stop(0)
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
