"""Checks of a config's keys one by one, against the table of keys.

What concerns a single key (is it known, is it there, has it the right type, is it
large enough, is it one of the choices) follows from the table alone. Relations between
keys are for `DecoderConfig` to check. Neither stops at the first fault.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any

from shardinit.models.keys import (
    DEFAULTS,
    FIXED,
    KEYS,
    REQUIRED,
    Key,
    known_names,
)

Fault = Callable[[str, str], None]
"""Takes the field and the description of one fault."""


def close_to(name: Any, known: tuple[str, ...]) -> str:
    """A question whether the nearest of ``known`` was meant, or nothing."""
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.7)
    return f"; did you mean {close[0]!r}?" if close else ""


def refuse_unknown(config: Mapping[str, Any], family: str | None, fault: Fault) -> None:
    """Reports every key that ``family`` does not have, or whose value is no choice.

    Args:
      config: the config.
      family: its model type; None if that is not known.
      fault: called with field and description of each fault.
    """
    named = {key.name: key for key in KEYS}
    for name, value in config.items():
        if name in FIXED and value not in (*FIXED[name], None):
            fault(name, f"{value!r} is not supported; only {FIXED[name][0]!r} is")
        elif name in named and family and family not in named[name].families:
            if not _is_idle(name, value, family):
                own = ", ".join(named[name].families)
                fault(name, f"no key of model_type {family!r}, but of {own}")
        elif name not in known_names(None):
            fault(name, f"unknown key{close_to(name, known_names(family))}")


def _is_idle(name: str, value: Any, family: str) -> bool:
    """Whether another family's key says nothing here."""
    if value is None or value is False:
        return True  # says that the family lacks what it lacks
    # some tools write the rotary part here
    return name == "head_dim" and family == "deepseek_v3"


def read_values(
    config: Mapping[str, Any], family: str | None, fault: Fault
) -> dict[str, Any]:
    """Reads every key of the table, alone.

    Args:
      config: the config.
      family: its model type; None if that is not known.
      fault: called with field and description of each fault.

    Returns:
      The values by field, defaults filled in; a faulty or missing one is None.
    """
    values: dict[str, Any] = {}
    for key in KEYS:
        if family is not None and family not in key.families:
            continue
        value = config.get(key.name)
        if value is None:
            nulled = key.name in config and key.nullable
            default = None if nulled else _default(key, family, fault)
            values.setdefault(key.field, default)
            continue
        text = _value_fault(value, key)
        if text is not None:
            fault(key.name, text)
            value = None
        elif key.type == "number":
            value = float(value)
        values[key.field] = value
    return values


def _default(key: Key, family: str | None, fault: Fault) -> Any:
    """What a key means that a config does not have; a fault if it must have it."""
    default = DEFAULTS.get(family or "", {}).get(key.name, key.default)
    if default is not REQUIRED:
        return default
    if family is not None:
        fault(key.name, f"missing; {key.text}")
    return None


def _value_fault(value: Any, key: Key) -> str | None:
    """What is wrong with the value of a key, by itself; None if nothing is."""
    text = _type_fault(value, key.type)
    if text is not None:
        return text
    if key.least is not None and value < key.least:
        return f"{value} is too small; at least {key.least}"
    if key.choices and value not in key.choices:
        known = f"{value!r} is not one of {', '.join(key.choices)}"
        return known + close_to(value, key.choices)
    return None


_TYPES: dict[str, tuple[type, ...]] = {
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "string": (str,),
    "object": (Mapping,),
    "array": (list, tuple),
}


def _type_fault(value: Any, kind: str) -> str | None:
    right = isinstance(value, _TYPES[kind])
    if right and (kind == "boolean" or not isinstance(value, bool)):
        return None
    return f"{value!r} is a {type(value).__name__}; expected {kind}"
