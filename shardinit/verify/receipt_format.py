"""The fields of a receipt's JSON: their types, their seal, and which formats exist."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from typing import Any

from shardinit.errors import ReceiptFormatError
from shardinit.files import write_file
from shardinit.verify.digest.host import ALGORITHM

FORMAT = 2


def _list_of(kind: type) -> Callable[[Any], bool]:
    return lambda value: (
        isinstance(value, list) and all(type(item) is kind for item in value)
    )


def _dict_of_str(value: Any) -> bool:
    return isinstance(value, dict) and _list_of(str)([*value, *value.values()])


# What each field of the JSON may be. The last two came with format 2.
FIELDS: dict[str, Callable[[Any], bool]] = {
    "name": lambda value: isinstance(value, str),
    "fingerprint": lambda value: isinstance(value, str),
    "seed": lambda value: value is None or type(value) is int,
    "key": _list_of(int),
    "key_impl": lambda value: isinstance(value, str),
    "platform": lambda value: isinstance(value, str),
    "device": lambda value: isinstance(value, str),
    "processor": _list_of(str),
    "versions": _dict_of_str,
    "x64": lambda value: isinstance(value, bool),
    "xla_flags": _list_of(str),
    "not_mesh_free": _dict_of_str,
    "leaves": _list_of(dict),
    "root": lambda value: isinstance(value, str),
    "kept": _list_of(str),
    "seal": lambda value: isinstance(value, str),
}
SINCE_2 = ("kept", "seal")
# Fields that are there only if they say something.
OPTIONAL: dict[str, Callable[[Any], bool]] = {"streams": _list_of(str)}
_LEAF_FIELDS: dict[str, Callable[[Any], bool]] = {
    "path": lambda value: isinstance(value, str),
    "shape": _list_of(int),
    "dtype": lambda value: isinstance(value, str),
    "digest": lambda value: isinstance(value, str),
}


def head_of(number: int) -> dict[str, Any]:
    """The first two fields of a receipt of that format."""
    return {"format": number, "algorithm": ALGORITHM}


def seal_of(facts: dict[str, Any]) -> str:
    """256 bits in hex of all that a receipt, or a pin, says.

    The leaves as well, though a receipt's root is of their digests: their shapes and
    dtypes are not in it, and would else change unnoticed.
    """
    said = {k: v for k, v in facts.items() if k != "seal"}
    text = json.dumps(said, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def read_fields(text: str | bytes) -> dict[str, Any]:
    """The fields of a receipt's JSON, each of the type that it is written with."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _unreadable(f"{type(error).__name__}: {error}") from error
    if not isinstance(data, dict):
        raise _unreadable(f"a {type(data).__name__}")
    head = data.get("format"), data.get("algorithm")
    if head not in ((1, ALGORITHM), (FORMAT, ALGORITHM)):
        raise ReceiptFormatError(
            "receipt",
            f"format {head[0]} with digests of {head[1]}",
            f"format 1 or {FORMAT} with digests of {ALGORITHM}",
        )
    absent = SINCE_2 if head[0] == 1 else ()
    wanted = {name: ok for name, ok in FIELDS.items() if name not in absent}
    wanted |= {name: ok for name, ok in OPTIONAL.items() if name in data}
    _check_fields("", data, {**wanted, "format": bool, "algorithm": bool})
    for number, leaf in enumerate(data["leaves"]):
        _check_fields(f"leaves[{number}].", leaf, _LEAF_FIELDS)
    return data


def _check_fields(
    where: str, data: dict[str, Any], wanted: dict[str, Callable[[Any], bool]]
) -> None:
    for name in (*wanted, *data):
        if name not in data:
            raise _unreadable(f"it has no field {where + name!r}")
        if name not in wanted:
            raise _unreadable(f"it has a field {where + name!r}")
        if not wanted[name](data[name]):
            raise _unreadable(f"{where}{name} is {data[name]!r}")


def _unreadable(what: str) -> ReceiptFormatError:
    return ReceiptFormatError(
        "receipt",
        f"it cannot be read ({what})"[:200],
        "the JSON that a receipt was saved as",
    )


def save_text(
    path: str | os.PathLike[str], text: str, what: str, *, replace: bool
) -> None:
    """Writes a receipt or a pin whole; where the same is already, it is left.

    Args:
      path: the file.
      text: its JSON.
      what: ``"receipt"`` or ``"pin"``, for people.
      replace: whether something else that is there may be replaced.

    Raises:
      ReceiptFormatError: something else is there.
    """
    try:
        write_file(path, text.encode(), replace=replace)
    except FileExistsError as error:
        raise ReceiptFormatError.taken(what, path, f"it is not this {what}") from error
