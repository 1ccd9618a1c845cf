"""Tracing: spans of calls, and of the jobs that workers do for them.

Where OpenTelemetry is installed and the operator configures it with its own variables
(``opentelemetry-instrument shardinit serve``), a call is a span that continues the
caller's trace, and each job that a worker does for it is one below. Else nothing is
done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

try:
    from opentelemetry import propagate as _propagate
    from opentelemetry import trace as _trace
except ImportError:  # an optional package
    _trace = _propagate = None


class Opened(NamedTuple):
    """A span that runs.

    Attributes:
      end: to be called with the name of the status code.
      trace: for what is done because of it elsewhere, as W3C's ``traceparent``.
    """

    end: Callable[[str], None] = lambda code: None
    trace: str = ""


@contextmanager
def span(
    method: str, metadata: Iterable[tuple[str, str | bytes]] | None
) -> Iterator[Opened]:
    """A server span that continues the caller's trace; nothing without OpenTelemetry.

    Args:
      method: full name of the method.
      metadata: the call's pairs of key and value.
    """
    if _trace is None or _propagate is None:
        yield Opened()
        return
    carrier = {key: value for key, value in metadata or () if isinstance(value, str)}
    tracer = _trace.get_tracer("shardinit.service")
    opened = tracer.start_span(
        method,
        context=_propagate.extract(carrier),
        kind=_trace.SpanKind.SERVER,
        attributes={"rpc.system": "grpc", "rpc.method": method},
    )
    passed: dict[str, str] = {}
    _propagate.inject(passed, _trace.set_span_in_context(opened))
    failed = _trace.StatusCode.ERROR

    def end(code: str) -> None:
        opened.set_attribute("rpc.grpc.status_code", code)
        if code in ("INTERNAL", "UNKNOWN", "DATA_LOSS"):
            opened.set_status(failed)

    # Not made the current span: a stream's generator is resumed by whichever task.
    try:
        yield Opened(end, passed.get("traceparent", ""))
    finally:
        opened.end()
