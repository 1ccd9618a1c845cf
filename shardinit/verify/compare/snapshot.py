"""Snapshot: all that can be said of an initialisation, leaf by leaf, as a small file.

Plans, programs, receipts and checkpoints say different things of the same leaves. A
snapshot has a place for each of them, empty where its source does not know, so that any
two can be held against each other. Saved as JSON it is a *pin*.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from typing import Any

from shardinit.errors import ReceiptFormatError
from shardinit.short import plural
from shardinit.verify.receipt_format import save_text, seal_of

FORMAT = "shardinit-pin-1"


@dataclass(frozen=True)
class LeafSnapshot:
    """What is known of one leaf; None, or nothing, where it is not.

    Attributes:
      path: its key path; shape: its shape; dtype: its dtype.
      sharding: its partition spec, as text.
      law: the distribution that it is drawn from, as text.
      function: hash of its program with the scalars that it is given, in hex.
      keys: hash of how its keys derive from the root key, in hex.
      derived: that derivation, for people.
      bits: hash of the first random bits of its keys.
      values: by what was hashed (``windows``, ``full``) the hash of its values.

    Example:
      >>> LeafSnapshot("w", (8, 32), "float32").function is None
      True
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    sharding: str | None = None
    law: str | None = None
    function: str | None = None
    keys: str | None = None
    derived: str | None = None
    bits: str | None = None
    values: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Snapshot:
    """What is known of an initialisation.

    Attributes:
      name: of the model.
      leaves: every leaf, in the order of the tree.
      fingerprint: of the function, in hex; None if there is none.
      key: words of the root key; None where no key was given.
      impl: implementation of the root key.
      mesh: size of each mesh axis.
      made_by: what computed the values: platform, processor, versions.

    Example:
      >>> import jax, shardinit
      >>> from shardinit.verify.compare.taking import snapshot
      >>> made = snapshot(lambda key: jax.random.normal(key, (8, 32)), 42)
      >>> Snapshot.from_json(made.to_json()) == made
      True
    """

    name: str
    leaves: tuple[LeafSnapshot, ...]
    fingerprint: str | None = None
    key: tuple[int, ...] | None = None
    impl: str | None = None
    mesh: dict[str, int] = field(default_factory=dict)
    made_by: dict[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"<Snapshot of {self.name}, {plural(len(self.leaves), 'leaf')}>"

    def to_json(self) -> str:
        """The snapshot as JSON text."""
        facts = dataclasses.asdict(self)
        facts["leaves"] = [
            {name: value for name, value in leaf.items() if value not in (None, {})}
            for leaf in facts["leaves"]
        ]
        said = {"format": FORMAT, **facts}
        return json.dumps({**said, "seal": seal_of(said)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Snapshot:
        """Reads what ``to_json`` wrote.

        Raises:
          ReceiptFormatError: it is no pin, one of another format, or one whose seal
            does not belong to what it says.
        """
        try:
            data = json.loads(text)
            if data["format"] != FORMAT:
                raise ValueError("another format")
            if data.pop("seal") != seal_of(data):
                raise ValueError("its seal does not belong to what it says")
            del data["format"]
            leaves = tuple(_leaf(leaf) for leaf in data.pop("leaves"))
            key = data.pop("key")
            made = cls(leaves=leaves, key=None if key is None else tuple(key), **data)
        # `json.loads` recurses: a file of 200,000 brackets is a RecursionError (3.11,
        # 3.13).
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
            raise ReceiptFormatError(
                "pin",
                f"it cannot be read ({type(e).__name__}: {e})"[:200],
                f"the JSON of a pin ({FORMAT})",
                "shardinit pin SPEC FILE writes one",
            ) from e
        return made

    def save(self, path: str | os.PathLike[str], *, replace: bool = False) -> None:
        """Writes the pin to ``path``: complete under its name, or not at all.

        Args:
          path: the file; where this pin is already, it is left.
          replace: whether something else that is there may be replaced.

        Raises:
          ReceiptFormatError: something else is there.
        """
        save_text(path, self.to_json(), "pin", replace=replace)


def _leaf(data: dict[str, Any]) -> LeafSnapshot:
    made = LeafSnapshot(**{**data, "shape": tuple(data["shape"])})
    if not all(isinstance(x, str) for x in (made.path, made.dtype)):
        raise ValueError("a leaf whose path or dtype is no text")
    if not isinstance(made.values, dict):
        raise ValueError("a leaf whose values are no object")
    return made
