"""Status: an exception on one side of the wire is an exception on the other.

The server turns what went wrong into a ``google.rpc.Status``: a code, one line, and
details that a program can read. Faults of a spec are field violations, so that a
client in any language shows them by field; a Python client makes a ``SpecError`` of
them again. A limit that was reached is a quota failure that names it, and comes with
the time after which to ask again, if that is of use. What the server did not foresee is
INTERNAL and says nothing but the request's id, since an unforeseen message may hold
anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from shardinit import errors
from shardinit.short import plural

DOMAIN = "shardinit"
REQUEST_ID = "x-request-id"
_Detail = TypeVar("_Detail", bound=Message)
# Attribute and key: ``got`` was ``came`` when the wire was laid down.
_PARTS = {"where": "where", "got": "came", "expected": "expected", "remedy": "remedy"}

# Metadata is limited to 8 KiB by every gRPC client unless told otherwise, and what it
# takes is more than this: base64, and the same line once more, percent-encoded.
_DETAIL_BYTES = 3072

_CODES: tuple[tuple[type[Exception], grpc.StatusCode], ...] = (
    (grpc.RpcError, grpc.StatusCode.CANCELLED),  # its caller's stream has ended
    (errors.SpecError, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.ShardingError, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.SelectError, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.ShardinitError, grpc.StatusCode.FAILED_PRECONDITION),
)

_BY_NUMBER = {code.value[0]: code for code in grpc.StatusCode}


def one_line(text: object, limit: int = 500) -> str:
    """``text`` with every run of white space as one space, cut at ``limit`` bytes."""
    line = " ".join(str(text).split())
    data = line.encode(errors="replace")
    if len(data) <= limit:
        return line
    return data[: limit - 3].decode(errors="ignore") + "…"


def code_of(error: Exception) -> grpc.StatusCode:
    """The status code for an exception; INTERNAL for one that was not foreseen."""
    if isinstance(error, Refusal):
        return _BY_NUMBER[error.status.code]
    if isinstance(error, errors.ServiceError):
        return getattr(grpc.StatusCode, error.code, grpc.StatusCode.UNKNOWN)
    for kind, code in _CODES:
        if isinstance(error, kind):
            return code
    return grpc.StatusCode.INTERNAL


class Refusal(Exception):
    """A status that is ready to be sent, as another process made it of its error.

    Attributes:
      status: the ``google.rpc.Status``.
    """

    def __init__(self, status: status_pb2.Status):
        super().__init__(status.message)
        self.status = status


def to_status(error: Exception, request_id: str) -> status_pb2.Status:
    """An exception of the server as a status for the client."""
    if isinstance(error, Refusal):
        return _told_to(error.status, request_id)
    code = code_of(error)
    if code is grpc.StatusCode.INTERNAL:
        text = f"internal error; the server's log has it under request {request_id}"
    elif isinstance(error, errors.SpecError):
        text = one_line(f"{error.where}: {plural(len(error.faults), 'fault')}")
    else:
        text = one_line(error)
    status = status_pb2.Status(code=code.value[0], message=text)
    status.details.add().Pack(error_details_pb2.RequestInfo(request_id=request_id))
    if code is not grpc.StatusCode.INTERNAL:
        _add_details(status, error)
    return status


def _told_to(status: status_pb2.Status, request_id: str) -> status_pb2.Status:
    """The same for another call: several wait for one build, each with an id."""
    told = status_pb2.Status()
    told.CopyFrom(status)
    for detail in told.details:
        if detail.Unpack(error_details_pb2.RequestInfo()):
            detail.Pack(error_details_pb2.RequestInfo(request_id=request_id))
    return told


def reason_of(status: status_pb2.Status) -> str:
    """Why a call was refused, as metrics count it; empty if it was not refused.

    The limit that was reached, what the caller may not have, or ``unauthenticated``.
    """
    if status.code == grpc.StatusCode.UNAUTHENTICATED.value[0]:
        return "unauthenticated"
    denied = _detail(status.details, error_details_pb2.ErrorInfo).metadata
    if "denied" in denied:
        return denied["denied"].partition(":")[0]
    return _limit_of(status.details)


def trailing(
    status: status_pb2.Status, request_id: str
) -> tuple[tuple[str, str | bytes], ...]:
    """The metadata in which a status and the request's id travel."""
    made: Any = rpc_status.to_status(status)
    return ((REQUEST_ID, request_id), *made.trailing_metadata)


def _add_details(status: status_pb2.Status, error: Exception) -> None:
    info = error_details_pb2.ErrorInfo(domain=DOMAIN, reason=type(error).__name__)
    faults: tuple[tuple[str, str], ...] = ()
    if isinstance(error, errors.SpecError):
        faults = error.faults
        info.metadata["model"] = one_line(error.model, 128)
    elif isinstance(error, errors.ShardinitError):
        for part, key in _PARTS.items():
            info.metadata[key] = one_line(getattr(error, part))
        if isinstance(error, errors.ShardingError | errors.SelectError):
            faults = ((error.where, one_line(error)),)
    if denied := getattr(error, "denied", ""):
        info.metadata["denied"] = denied
    status.details.add().Pack(info)
    if isinstance(error, errors.ServiceError):
        _add_quota(status, error)
    if not faults:
        return
    request = error_details_pb2.BadRequest()
    left = _DETAIL_BYTES
    for i, (field, text) in enumerate(faults):
        field, text = one_line(field, 200), one_line(text)
        left -= len(field.encode()) + len(text.encode()) + 8
        if left < 0:
            rest = f"{len(faults) - i} more faults"
            request.field_violations.add(field="…", description=rest)
            break
        request.field_violations.add(field=field, description=text)
    status.details.add().Pack(request)


def _add_quota(status: status_pb2.Status, error: errors.ServiceError) -> None:
    """Which limit was reached, and when to ask again."""
    if error.limit:
        failure = error_details_pb2.QuotaFailure()
        text = one_line(
            f"{error.got}; {error.expected}" if error.expected else error.got
        )
        failure.violations.add(subject=error.limit, description=text)
        status.details.add().Pack(failure)
    if error.retry_after is not None:
        again = error_details_pb2.RetryInfo()
        again.retry_delay.FromNanoseconds(int(error.retry_after * 1e9))
        status.details.add().Pack(again)


def from_rpc_error(error: grpc.RpcError, where: str) -> errors.ShardinitError:
    """The exception that a client raises for a failed call.

    Args:
      error: what grpc raised; it is a ``grpc.Call`` too.
      where: the call and its target, for the message.

    Returns:
      the server's ``SpecError`` again, or a ``ServiceError`` of one line.
    """
    call: Any = error  # grpc's stubs do not say that it is a Call too
    code, details = call.code(), _details(call)
    info = _detail(details, error_details_pb2.ErrorInfo)
    ours = info.domain == DOMAIN
    violations = _detail(details, error_details_pb2.BadRequest).field_violations
    if ours and info.reason == "SpecError" and violations:
        faults = [(v.field, v.description) for v in violations]
        return errors.SpecError(info.metadata["model"], faults)
    if ours and info.metadata.get("came"):
        parts = {part: info.metadata.get(key, "") for part, key in _PARTS.items()}
        parts["where"] = f"{where}: {parts['where']}" if parts["where"] else where
    else:
        got = _explain(code, call.details())
        parts = {"where": where, "got": got, **_help(code, details)}
    request_id = _detail(details, error_details_pb2.RequestInfo).request_id
    if request_id and code is not grpc.StatusCode.INTERNAL:
        parts["remedy"] = f"{parts['remedy']} (request {request_id})".strip()
    return errors.ServiceError(
        **parts,
        code=code.name,
        limit=_limit_of(details),
        denied=info.metadata.get("denied", ""),
        retry_after=_seconds(_detail(details, error_details_pb2.RetryInfo)),
        request_id=request_id,
    )


def _help(code: grpc.StatusCode, details: Sequence[any_pb2.Any]) -> dict[str, str]:
    """What was expected, and what to do, where no server said so."""
    if code is grpc.StatusCode.UNAVAILABLE and not details:
        expected = "a service that runs there"
        return {"expected": expected, "remedy": "shardinit serve starts one"}
    return {"remedy": ""}


def _details(call: grpc.Call) -> Sequence[any_pb2.Any]:
    """The details of a failed call."""
    try:
        status = rpc_status.from_call(call)
    except ValueError:  # the status contradicts its details: trust neither
        return ()
    return status.details if status is not None else ()


def _detail(details: Sequence[any_pb2.Any], kind: type[_Detail]) -> _Detail:
    """The detail of a kind; an empty one if there is none."""
    message = kind()
    for detail in details:
        if detail.Unpack(message):
            break
    return message


def _limit_of(details: Sequence[any_pb2.Any]) -> str:
    """The limit that was reached; empty if none was."""
    quota = _detail(details, error_details_pb2.QuotaFailure)
    return "".join(violation.subject for violation in quota.violations[:1])


def _seconds(retry: error_details_pb2.RetryInfo) -> float | None:
    """After how long to ask again; None if nothing is said of it."""
    if not retry.HasField("retry_delay"):
        return None
    return retry.retry_delay.ToNanoseconds() / 1e9


def _explain(code: grpc.StatusCode, details: str | None) -> str:
    text = one_line(details or "no details")
    if code is grpc.StatusCode.UNAVAILABLE:
        return f"the service cannot be reached ({text})"
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return "no answer within the caller's own deadline"
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return f"the server does not have this call ({text})"
    return text
