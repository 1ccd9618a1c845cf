"""The record of a receipt: what it says, as JSON and back.

It imports no JAX, so that a client may read the receipt of a checkpoint that a service
wrote.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from typing import Any

from shardinit.errors import ReceiptFormatError
from shardinit.short import plural
from shardinit.verify.digest.host import root_digest
from shardinit.verify.receipt_format import (
    FIELDS,
    FORMAT,
    OPTIONAL,
    SINCE_2,
    head_of,
    read_fields,
    save_text,
    seal_of,
)


@dataclass(frozen=True)
class LeafReceipt:
    """What a receipt says of one leaf: its kind, and 128 bits of its values in hex.

    Example:
      >>> LeafReceipt("w", (8, 32), "float32", "00" * 16).shape
      (8, 32)
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    digest: str


@dataclass(frozen=True)
class Receipt:
    """What some weights are and how they were made.

    Attributes:
      name: of the model.
      fingerprint: of the init function, in hex.
      seed: the seed, if one was given instead of a key.
      key: the words of the key; of several streams those of one after the other.
      key_impl: the implementation of the key, such as ``"threefry2x32"``.
      platform: ``"cpu"``, ``"gpu"`` or ``"tpu"``.
      device: what JAX calls the chip.
      processor: the machine's architecture and, on CPU, the features that decide which
        code the compiler writes.
      versions: of jax, jaxlib and shardinit.
      x64: whether 64-bit types were on.
      xla_flags: those of ``XLA_FLAGS`` that may change the code of a platform.
      not_mesh_free: by path, why the bits of a leaf may depend on the mesh.
      leaves: every leaf, in the order of the tree.
      root: 256 bits of all leaves, in hex.
      kept: paths of leaves that were restored or given and not made by the function.
      streams: the names of the streams that have a key each, in the order of the words;
        none of a single key.
      seal: 256 bits of all that the receipt says, in hex; None for a receipt of format
        1, which has none.

    Example:
      >>> import jax, shardinit
      >>> plan = shardinit.plan(lambda key: jax.random.normal(key, (8, 32)))
      >>> made = shardinit.receipt(plan, 42, shardinit.compile_plan(plan)(42))
      >>> Receipt.from_json(made.to_json()) == made, made.seed, made.key
      (True, 42, (0, 42))
    """

    name: str
    fingerprint: str
    seed: int | None
    key: tuple[int, ...]
    key_impl: str
    platform: str
    device: str
    processor: tuple[str, ...]
    versions: dict[str, str]
    x64: bool
    xla_flags: tuple[str, ...]
    not_mesh_free: dict[str, str]
    leaves: tuple[LeafReceipt, ...]
    root: str
    kept: tuple[str, ...] = ()
    streams: tuple[str, ...] = ()
    # Receipts of both formats are equal that say the same: one of format 1 has no seal.
    seal: str | None = field(default=None, compare=False)

    @property
    def sealed(self) -> Receipt:
        """The receipt with its seal.

        Example:
          >>> import jax, shardinit
          >>> plan = shardinit.plan(lambda key: {"w": jax.random.normal(key)})
          >>> made = shardinit.receipt(plan, 42, shardinit.compile_plan(plan)(42))
          >>> made.sealed.seal == made.seal
          True
        """
        return dataclasses.replace(
            self, seal=seal_of({**head_of(FORMAT), **self._facts()})
        )

    def _facts(self) -> dict[str, Any]:
        """The fields of its JSON; optional ones only if they say something."""
        facts = dataclasses.asdict(self)
        return {k: v for k, v in facts.items() if v or k not in OPTIONAL}

    def to_json(self) -> str:
        """The receipt as JSON text, in the format that it was made or read in.

        Example:
          >>> import jax, json, shardinit
          >>> plan = shardinit.plan(lambda key: {"w": jax.random.normal(key)})
          >>> made = shardinit.receipt(plan, 42, shardinit.compile_plan(plan)(42))
          >>> json.loads(made.to_json())["seed"]
          42
        """
        facts = self._facts()
        if self.seal is None:
            facts = {k: v for k, v in facts.items() if k not in SINCE_2}
        head = head_of(FORMAT if self.seal is not None else 1)
        return json.dumps({**head, **facts}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Receipt:
        """Reads what ``to_json`` wrote.

        Raises:
          ReceiptFormatError: it is no receipt, one of another format, its root does not
            belong to its leaves, or its seal not to what it says.

        Example:
          >>> import jax, shardinit
          >>> plan = shardinit.plan(lambda key: {"w": jax.random.normal(key)})
          >>> made = shardinit.receipt(plan, 42, shardinit.compile_plan(plan)(42))
          >>> Receipt.from_json(made.to_json()).leaves[0].path
          'w'
        """
        data = read_fields(text)
        leaves = tuple(
            LeafReceipt(x["path"], tuple(x["shape"]), x["dtype"], x["digest"])
            for x in data["leaves"]
        )
        if root_digest({leaf.path: leaf.digest for leaf in leaves}) != data["root"]:
            raise ReceiptFormatError(
                "receipt", "its root does not belong to its leaves: it was changed"
            )
        if data.get("seal") not in (None, seal_of(data)):
            raise ReceiptFormatError(
                "receipt", "its seal does not belong to what it says: it was changed"
            )
        facts = {name: data[name] for name in (*FIELDS, *OPTIONAL) if name in data}
        lists = ("key", "processor", "xla_flags", "kept", "streams")
        tuples = {name: tuple(facts.pop(name, ())) for name in lists}
        return cls(**{**facts, **tuples, "leaves": leaves})

    def __repr__(self) -> str:
        leaves = plural(len(self.leaves), "leaf")
        return f"<Receipt of {self.name}, {leaves}, root {self.root}>"

    def save(self, path: str | os.PathLike[str], *, replace: bool = False) -> None:
        """Writes the receipt to ``path``: complete under its name, or not at all.

        Args:
          path: the file; where this receipt is already, it is left.
          replace: whether something else that is there may be replaced.

        Raises:
          ReceiptFormatError: something else is there.

        Example:
          >>> import jax, shardinit, tempfile
          >>> plan = shardinit.plan(lambda key: {"w": jax.random.normal(key)})
          >>> made = shardinit.receipt(plan, 42, shardinit.compile_plan(plan)(42))
          >>> with tempfile.TemporaryDirectory() as folder:
          ...     made.save(f"{folder}/receipt.json")
          ...     Receipt.load(f"{folder}/receipt.json") == made
          True
        """
        save_text(path, self.to_json(), "receipt", replace=replace)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Receipt:
        """Reads a file that ``save`` wrote.

        Raises:
          ReceiptFormatError: the file is no receipt.
          OSError: it cannot be read.

        Example:
          >>> import jax, shardinit, tempfile
          >>> plan = shardinit.plan(lambda key: {"w": jax.random.normal(key)})
          >>> made = shardinit.receipt(plan, 42, shardinit.compile_plan(plan)(42))
          >>> with tempfile.TemporaryDirectory() as folder:
          ...     made.save(f"{folder}/receipt.json")
          ...     Receipt.load(f"{folder}/receipt.json").seed
          42
        """
        if os.path.isdir(path):
            raise ReceiptFormatError(
                f"receipt {os.fspath(path)!r}",
                "it is a folder",
                "the file of a receipt",
                "That of a checkpoint lies beside it: FOLDER.receipt.json",
            )
        with open(path, "rb") as file:
            text = file.read()
        try:
            return cls.from_json(text)
        except ReceiptFormatError as error:
            error.relocate(f"receipt {os.fspath(path)!r}")
            raise
