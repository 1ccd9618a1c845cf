"""Why a leaf cannot be windowed: an enumeration, and its text for people."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Reason(enum.Enum):
    """Why every device computes all of a leaf. The values are kept in files."""

    NO_RULE = "no-rule"
    """No rule says how the primitive's result is windowed (QR, sort, sums)."""
    DRAWN_TABLE = "drawn-table"
    """Drawn indices read an array that is drawn itself."""
    AXIS_AGAIN = "axis-again"
    """An axis is read once for each of its own elements."""
    LARGE_TABLE = "large-table"
    """An array that windows read here and there is too large to be made on the way."""
    MANY_READS = "many-reads"
    """The window asks for the same values at too many different coordinates."""
    UNKNOWN = "unknown"
    """From a file that says it in words only."""


@dataclass(frozen=True)
class ReplicatedReason:
    """Why a program computes all of its leaf on every device.

    Attributes:
      reason: what kind of reason it is.
      text: the same for people, with the primitive and its shapes. No program reads it.
    """

    reason: Reason
    text: str

    def __str__(self) -> str:
        return self.text


class NotWindowable(Exception):
    """Raised by a rule, or for want of one: the leaf has to be computed in full.

    Attributes:
      reason: which reason it is.
    """

    def __init__(self, reason: Reason = Reason.NO_RULE):
        super().__init__(reason.value)
        self.reason = reason


def require(holds: bool, reason: Reason = Reason.NO_RULE) -> None:
    """Raises ``NotWindowable`` unless ``holds``."""
    if not holds:
        raise NotWindowable(reason)
