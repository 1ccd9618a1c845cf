"""Every exception that shardinit raises on purpose.

One shape for all of them: *where* it went wrong (a leaf path, a field, a file),
what was found there (*got*), what was *expected*, and the *remedy*. The message is
made of these four, and each stays readable as an attribute, so that a service can send
them as field violations and a notebook can show them.

>>> import shardinit
>>> try:
...     shardinit.init(lambda key: key, "seed")
... except shardinit.errors.ShardinitError as error:
...     error.where, error.got, error.remedy
('key', 'got str', 'Pass jax.random.key(0), or 0')
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Self


class ShardinitError(Exception):
    """Base of all errors raised by shardinit.

    Attributes:
      where: leaf path, field name or file that the error is about; may be empty.
      got: what was found there.
      expected: what would have been right; may be empty.
      remedy: what to do about it; may be empty.
    """

    def __init__(
        self, where: str = "", got: str = "", expected: str = "", remedy: str = ""
    ):
        self.got = got
        self.expected = expected
        self.remedy = remedy
        self.where = where
        super().__init__(self._text())

    @classmethod
    def taken(cls, what: str, name: object, why: str = "") -> Self:
        """The refusal to overwrite something; ``why`` it is not what was asked for."""
        return cls(
            f"{what} {str(name)!r}",
            "something of that name is there" + (f": {why}" if why else ""),
            "a name that is free",
            "Nothing is overwritten: remove it or choose another name",
        )

    def relocate(self, where: str) -> None:
        """Says more exactly where it happened, as somebody further out may know."""
        self.where = where
        self.args = (self._text(),)

    def _text(self) -> str:
        text = f"{self.where}: {self.got}" if self.where else self.got
        if self.expected:
            text += f"; expected {self.expected}"
        if self.remedy:
            text += f". {self.remedy}"
        return text


class ArgumentError(ShardinitError, TypeError, ValueError):
    """An argument of another type than asked for, or none of the values it may have."""

    @classmethod
    def check_bytes(cls, where: str, given: object) -> None:
        """Refuses what is no number of bytes."""
        if not isinstance(given, int) or isinstance(given, bool) or given < 0:
            raise cls(where, f"got {given!r}", "a number of bytes, such as 1 << 30")

    @classmethod
    def check_path(cls, where: str, given: object) -> None:
        """Refuses what is no path of a file."""
        if not isinstance(given, str | bytes | os.PathLike):
            raise cls(where, f"got {type(given).__name__}", "the path of a file")


class WindowError(ArgumentError, IndexError):
    """An index that is no window of its leaf: out of bounds, or of another type."""


class InitFnError(ShardinitError, TypeError):
    """The init function cannot be cut: effects, callbacks, leaves that are no arrays.

    Also raised when it closes over a tracer or cannot be traced abstractly.
    """


class InvalidKeyError(ShardinitError, TypeError, ValueError):
    """What is no key: an object of another type or shape, a seed beyond 64 bits."""


class ShardingError(ShardinitError, ValueError):
    """A sharding cannot be applied to a leaf of the plan.

    An axis that does not divide, an unknown mesh axis, a tree that does not match.
    """


class WholeLeafError(ShardinitError, ValueError):
    """Leaves take more than ``memory_limit`` on a device, or are refused as whole."""


class FindingsError(WholeLeafError):
    """``strict=`` refuses what a plan's findings say.

    Attributes:
      findings: those that are refused.
    """

    def __init__(
        self,
        where: str = "",
        got: str = "",
        expected: str = "",
        remedy: str = "",
        *,
        findings: Sequence[Any] = (),
    ):
        self.findings = tuple(findings)
        super().__init__(where, got, expected, remedy)


class FindingsWarning(UserWarning):
    """What a plan's findings say of leaves that take a MiB of each device or more."""


class SelectError(ShardinitError, KeyError):
    """A path or a glob that selects no leaf of the plan."""

    __str__ = Exception.__str__  # KeyError shows the repr of its argument


class UnsupportedConfigError(ShardinitError, RuntimeError):
    """A JAX setting under which shardinit cannot keep its promises."""


class FingerprintMismatchError(ShardinitError, RuntimeError):
    """Two processes, or a program and its plan, would compute different functions."""


class MissingProcessesError(ShardinitError, TimeoutError):
    """Processes of a job did not come to initialise what the others initialise."""


class TopologyError(ShardinitError, ValueError):
    """An audit cannot compile for a topology: no such one, or no compiler for it."""


class AuditError(ShardinitError, RuntimeError):
    """The compiler of a topology failed on a plan."""


class ProgramFormatError(ShardinitError, ValueError):
    """Bytes that are not an init program which this version may run."""


class DigestError(ShardinitError, ValueError):
    """Leaves or windows of which no digest can be made."""


class ReceiptFormatError(ShardinitError, ValueError):
    """A file that is not a receipt which this version can read."""


class ReceiptMismatchError(ShardinitError, ValueError):
    """Weights that are not those of their receipt.

    Attributes:
      differences: every leaf that differs and how, in the order of the receipt.
    """

    def __init__(
        self,
        where: str = "",
        got: str = "",
        expected: str = "",
        remedy: str = "",
        differences: Sequence[Any] = (),
    ):
        super().__init__(where, got, expected, remedy)
        self.differences = tuple(differences)


class CheckpointError(ShardinitError, RuntimeError):
    """A checkpoint that cannot be written or read as it was asked for."""


class ExecutablesError(ShardinitError, RuntimeError):
    """Executables that cannot be written, or are not for what would run them here."""


class ExecutablesWarning(UserWarning):
    """Executables were loaded, and some programs had to be compiled all the same."""


class DuplicateNamesError(ShardinitError, ValueError):
    """Several parameters of one model have the same name.

    Attributes:
      names: every name that is used more than once.
      paths: where in the model the parameters of those names are.
    """

    def __init__(self, names: Sequence[str], paths: Sequence[str]):
        self.names = tuple(names)
        self.paths = tuple(paths)
        shown = ", ".join(map(repr, paths[:8])) + (", …" if len(paths) > 8 else "")
        super().__init__(
            "",
            "several parameters have the same name. "
            f"Repeated names: {list(names)} (at {shown})",
            "one parameter for each name",
            "Give each its own prefix (add_parameter_prefix), or share it "
            "(mark_shareable, then attach_shared_parameters)",
        )


class NameClashError(ShardinitError, ValueError):
    """Two names of which the hashes are equal: both would be drawn from one key."""


class StructureMismatchError(ShardinitError, ValueError):
    """A value has another tree, shape or dtype than its parameter is for."""


class UninitializedParameterError(ShardinitError, RuntimeError):
    """The value of a parameter was asked for before it was initialised."""


class MissingSharedParameterError(ShardinitError, RuntimeError):
    """A shared parameter was looked up outside the wrapper that owns it."""


class SharedParameterError(ShardinitError, ValueError):
    """Parameters that are to be shared by name are not the same parameter."""


class PyTreeDataclassSafetyError(ShardinitError, TypeError):
    """A pytree dataclass inherits fields, or overwrites an __init__, unasked."""


class SelectionError(ShardinitError, ValueError):
    """A selection holds another number of nodes, or others, than it must."""


class ModuleStateError(ShardinitError, RuntimeError):
    """A module was used at the wrong time.

    Called before it was initialised, a key asked for outside of ``init``, a compact
    method that constructs other modules than in its first run.
    """


class ModuleFieldError(ShardinitError, TypeError):
    """A module's field is declared or filled wrongly, or two modules do not match."""


class MissingFrameworkError(ShardinitError, ImportError):
    """A front end whose framework is not installed, or not set up for JAX."""


class ServiceError(ShardinitError, RuntimeError):
    """The init service refused a request or could not be reached.

    Attributes:
      code: name of the gRPC status code, such as ``"INVALID_ARGUMENT"``.
      limit: name of the limit that was reached, such as ``"queue"``; may be empty.
      denied: what the caller may not have, of PERMISSION_DENIED: the role that it
        lacks, such as ``"role:write"``, or ``"model"`` or ``"place"``; may be empty.
      retry_after: seconds after which to ask again; None where that is no use.
      request_id: of the call that failed, as the service's log has it; may be empty.
    """

    def __init__(
        self,
        where: str = "",
        got: str = "",
        expected: str = "",
        remedy: str = "",
        code: str = "UNKNOWN",
        *,
        limit: str = "",
        denied: str = "",
        retry_after: float | None = None,
        request_id: str = "",
    ):
        super().__init__(where, got, expected, remedy)
        self.code = code
        self.limit = limit
        self.denied = denied
        self.retry_after = retry_after
        self.request_id = request_id


class SpecError(ShardinitError, ValueError):
    """A model spec with faults: all of them at once, each by field.

    Attributes:
      model: name of the model that the spec is of, or of the request that has faults.
      faults: pairs of field name and description, in the order of the fields.
    """

    def __init__(self, model: str, faults: Sequence[tuple[str, str]]):
        self.model = model
        self.faults = tuple((str(field), str(text)) for field, text in faults)
        lines = [f"{field}: {text}" for field, text in self.faults]
        count = f"{len(lines)} fault" + ("" if len(lines) == 1 else "s")
        super().__init__(
            f"spec of model {model!r}", f"{count}\n  " + "\n  ".join(lines)
        )
