"""Telemetry: what operators see of a server: metrics and log lines.

One call is one line in the log and one count in the metrics; its span is made by
`tracing`. Nothing is sent anywhere unless the operator asks for it, and nothing of a
request's content is recorded: the method, the code, the time, the request id.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from typing import Any, TypeVar

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
)
from prometheus_client import start_http_server as _start_http

from shardinit.errors import ServiceError
from shardinit.service.wire.access import split_address
from shardinit.service.wire.versions import PROTOCOL, jax_version
from shardinit.version import __version__

Metric = TypeVar("Metric", Counter, Gauge)
_BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)  # seconds


class Metrics:
    """The figures of one server.

    Attributes:
      registry: holds them, for whoever exports them in another way.
      calls: calls that have ended, by method and code.
      seconds: how long they took, by method.
      active: calls that run, by method.
      sent: bytes of windows that were sent.
      refused: what was refused, by the limit or the reason.
      waited: how long jobs waited for a worker.
      built: how long workers took to trace and build, by method.
      hits, misses: answers that were there, or under way, and those that were not.
      evicted: answers, programs and workers' plans that went to make room for others.
      killed: workers that have ended, by why.
      uploaded: bytes of programs that clients uploaded.
      written: bytes of checkpoints that were written.
      checkpoints: writes that have ended, by code; one may have had no call any more.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.calls = self._make(Counter, "calls", "Ended calls", ("method", "code"))
        self.seconds = self._histogram("call_seconds", "Time of a call", ("method",))
        self.active = self._make(Gauge, "active_calls", "Running calls", ("method",))
        self.sent = self._make(Counter, "stream_bytes", "Bytes of windows sent")
        self.refused = self._make(Counter, "refused", "Refused, by why", ("reason",))
        self.waited = self._histogram("queue_seconds", "Time that jobs waited")
        self.built = self._histogram("build_seconds", "Time of a build", ("method",))
        self.hits = self._make(Counter, "cache_hits", "Answers that were there")
        self.misses = self._make(Counter, "cache_misses", "Answers that were made")
        self.evicted = self._make(Counter, "cache_evictions", "What went to make room")
        self.killed = self._make(Counter, "workers_ended", "Ended workers", ("why",))
        self.uploaded = self._make(Counter, "upload_bytes", "Bytes of uploads")
        self.written = self._make(Counter, "checkpoint_bytes", "Bytes of checkpoints")
        self.checkpoints = self._make(
            Counter, "checkpoints", "Ended checkpoints", ("code",)
        )
        self._make(
            Gauge, "build_info", "What runs here", ("version", "jax", "protocol")
        ).labels(__version__, jax_version(), PROTOCOL).set(1)
        ProcessCollector(registry=self.registry)

    def seen(self, hit: bool) -> None:
        """Counts an answer that was there, or was not."""
        (self.hits if hit else self.misses).inc()

    def _histogram(
        self, name: str, text: str, labels: tuple[str, ...] = ()
    ) -> Histogram:
        return Histogram(
            f"shardinit_{name}", text, labels, registry=self.registry, buckets=_BUCKETS
        )

    def _make(
        self, kind: type[Metric], name: str, text: str, labels: tuple[str, ...] = ()
    ) -> Metric:
        return kind(f"shardinit_{name}", text, labels, registry=self.registry)

    def watch(self, name: str, text: str, read: Callable[[], float]) -> None:
        """A gauge that is read whenever somebody looks."""
        self._make(Gauge, name, text, ()).set_function(read)

    def serve(self, listen: str) -> tuple[str, Callable[[], None]]:
        """Exports the figures over HTTP; returns the address and how to stop.

        Raises:
          ServiceError: the address cannot be bound.
        """
        host, port = split_address(listen)
        try:
            server, thread = _start_http(port, host.strip("[]"), self.registry)
        except OSError as error:
            raise ServiceError(
                f"metrics address {listen!r}",
                error.strerror or str(error),
                "a free port of this machine",
                code="UNAVAILABLE",
            ) from error

        def stop() -> None:
            server.shutdown()
            server.server_close()
            thread.join()

        return f"{host}:{server.server_port}", stop


class JsonFormatter(logging.Formatter):
    """A log record as one line of JSON; what came in ``extra=`` stands beside it."""

    _own = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        seconds = time.gmtime(record.created)
        line: dict[str, Any] = {
            "time": f"{time.strftime('%FT%T', seconds)}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        given = vars(record).items()
        line |= {name: value for name, value in given if name not in self._own}
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        elif record.exc_text:  # a worker's
            line["error"] = record.exc_text
        return json.dumps(line, default=str)
