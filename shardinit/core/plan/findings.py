"""Findings: what is wrong with a plan, or worth knowing of it, before it runs.

A *warning* is something that the user would hardly want: a large leaf that lies whole
on every device though rules were given for it, a leaf that every device has to compute
in full, two leaves of one value. A *note* is worth knowing and often meant so. The
findings about where leaves lie are made in ``placing``, those about how they are drawn
in ``drawing``; here is what they have in common, and what is done with them.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from shardinit.errors import FindingsError, FindingsWarning
from shardinit.short import short_repr

KINDS: Final = {
    "replicated": "warning",
    "unnamed": "warning",
    "computed-in-full": "warning",
    "rbg": "warning",
    "same-key": "warning",
    "unused-key": "warning",
    "host-random": "warning",
    "by-process": "warning",
    "overruled": "warning",
    "nothing-sharded": "warning",
    "unmatched-rule": "note",
    "short-names": "note",
    "narrow-draw": "note",
    "explicit-mesh": "note",
    "no-mesh": "note",
}
"""Every kind with its severity.

Of small leaves ``replicated`` is a note, of small models ``nothing-sharded`` is one.
"""

WARN_BYTES: Final = 1 << 20
_SHOWN = 3
_PACKAGE = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))


@dataclass(frozen=True)
class Finding:
    """One thing to say of a plan.

    Attributes:
      kind: one of ``KINDS``.
      severity: ``"warning"`` or ``"note"``.
      leaves: paths of the leaves that it is about; empty where it is about all.
      rules: the rules that are the cause.
      reason: what is the case.
      remedy: what to write instead.

    Example:
      >>> import jax, shardinit
      >>> auto = (jax.sharding.AxisType.Auto,)
      >>> mesh = jax.sharding.AbstractMesh((8,), ("data",), axis_types=auto)
      >>> def fn(key):
      ...     return {"odd": jax.random.normal(key, (255, 257))}
      >>> [finding] = shardinit.plan(fn, mesh=mesh, rules=shardinit.fsdp()).findings
      >>> finding.kind, finding.severity, finding.leaves
      ('replicated', 'warning', ('odd',))
    """

    __repr__ = short_repr

    kind: str
    severity: str
    leaves: tuple[str, ...]
    rules: tuple[object, ...]
    reason: str
    remedy: str

    def __str__(self) -> str:
        rules = f" ({_listed(self.rules_as_text)})" if self.rules else ""
        where = f" {_listed(self.leaves)}:" if self.leaves else ""
        return (
            f"{self.severity} [{self.kind}]{where} {self.reason}{rules}. {self.remedy}"
        )

    @property
    def rules_as_text(self) -> list[str]:
        """The rules as one would write them; those that a service sent are text."""
        return [rule if isinstance(rule, str) else repr(rule) for rule in self.rules]

    def as_data(self) -> dict[str, str | list[str]]:
        """The finding as plain data, for JSON; rules as text."""
        return {
            "kind": self.kind,
            "severity": self.severity,
            "leaves": list(self.leaves),
            "rules": self.rules_as_text,
            "reason": self.reason,
            "remedy": self.remedy,
        }


def finding(
    kind: str,
    leaves: Iterable[str],
    reason: str,
    remedy: str,
    *,
    rules: Iterable[object] = (),
    severity: str | None = None,
) -> Finding:
    """A finding of a kind, with the kind's severity unless another is given."""
    severity = severity or KINDS[kind]
    return Finding(kind, severity, tuple(leaves), tuple(rules), reason, remedy)


def _listed(items: Iterable[str]) -> str:
    found = list(items)
    more = len(found) - _SHOWN
    return ", ".join(found[:_SHOWN]) + (f" and {more:,} more" if more > 0 else "")


def as_text(findings: Sequence[Finding]) -> str:
    """All findings, a line each, warnings first; empty if there are none."""
    ordered = sorted(findings, key=lambda found: found.severity != "warning")
    return "\n".join(map(str, ordered))


def refuse(
    findings: Sequence[Finding], strict: bool | Collection[str], name: str
) -> None:
    """Refuses what ``strict`` does not allow, all of it in one error.

    Args:
      findings: of the plan.
      strict: True refuses warnings, a collection of kinds refuses those.
      name: of the plan.

    Raises:
      FindingsError: there are some.
    """
    if isinstance(strict, bool):
        refused = [x for x in findings if strict and x.severity == "warning"]
    else:
        refused = [x for x in findings if x.kind in strict]
    if refused:
        kinds = sorted({x.kind for x in refused})
        raise FindingsError(
            f"plan of {name}",
            "\n".join(map(str, refused)),
            f"none of {', '.join(kinds)} (strict={strict!r})",
            "Follow the remedies, or name in strict={...} the kinds to refuse",
            findings=tuple(refused),
        )


def warn(findings: Sequence[Finding], bytes_on_device: Mapping[str, int]) -> None:
    """One Python warning for all findings of severity warning that weigh 1 MiB.

    Args:
      findings: of the plan.
      bytes_on_device: by path, bytes of the leaf on one device.
    """
    heavy = [
        found
        for found in findings
        if found.severity == "warning"
        and sum(bytes_on_device.get(path, 0) for path in found.leaves) > WARN_BYTES
    ]
    if heavy:
        text = "\n".join(map(str, heavy))
        warnings.warn(text, FindingsWarning, stacklevel=_outside())


def _outside() -> int:
    """How far up the stack the caller of the package is, as seen from ``warn``."""
    # `warnings.warn(skip_file_prefixes=)` does this from Python 3.12 on; 3.11 lacks it.
    level, frame = 1, sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        level, frame = level + 1, frame.f_back
    return level
