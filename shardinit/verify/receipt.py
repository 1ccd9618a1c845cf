"""Receipt: what a job started from, written down so that anyone can check it.

Initial weights are a function at a key, so a receipt names both, by the fingerprint of
the function and the data of the key. Bits also belong to what computed them: the
platform, the chip or the CPU's feature set, the version of the compiler. With those a
receipt says how to make the same weights again; with the digest of every leaf it says
whether some weights are them.

Receipts are JSON, for people and other programs alike. The root covers the
leaves' values and the seal all statements, so that none can be changed unnoticed. That
finds mistakes and damage; it is no signature.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import jax
import numpy as np

from shardinit.core import platform as machine
from shardinit.core.ir.jaxpr import setting
from shardinit.core.paths import chosen
from shardinit.core.plan.options import Select
from shardinit.core.plan.plan import Plan, checked
from shardinit.core.prng import derivation as keys
from shardinit.core.prng.root_key import KeyLike, as_key
from shardinit.core.run.arguments import key_words
from shardinit.errors import ReceiptFormatError, ReceiptMismatchError
from shardinit.verify.digest.devices import digest
from shardinit.verify.digest.host import Digest, root_digest
from shardinit.verify.held import hold_against
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
from shardinit.version import __version__

_SHOWN = 5


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
        return (
            f"<Receipt of {self.name}, {len(self.leaves):,} leaves, root {self.root}>"
        )

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


def receipt(plan: Plan, key: KeyLike, params: Any, *, kept: Select = ()) -> Receipt:
    """Makes the receipt of weights that were just initialised.

    The weights are held against the plan first: their paths, shapes and dtypes, and of
    each leaf two windows of at most 8 x 8 elements, where this process holds it. Of a
    ``Digest`` the leaves of at most 1 MiB are computed anew. Leaves that the compiler
    partitions (``whole="gspmd"``) are held by name alone: they stand in
    ``not_mesh_free``.

    In a job of several processes all of them must call this, and all get the same.

    Args:
      plan: what was run.
      key: the key, or the int seed, that it was run with.
      params: the weights; or their ``Digest``, if they were seen in windows.
      kept: globs or a predicate on paths: leaves that were restored and not made by
        the plan. So count, too, those that the plan's ``select`` leaves out.

    Raises:
      DigestError: a leaf without values, as ``select`` leaves them.
      ReceiptMismatchError: the weights are not those of the plan at the key.
      TypeError: a key that the plan was not made for.

    Example:
      >>> import jax, shardinit
      >>> plan = shardinit.plan(lambda key: jax.random.normal(key, (8, 32)))
      >>> params = shardinit.compile_plan(plan)(42)
      >>> shardinit.receipt(plan, 42, params).root == shardinit.digest(params).root
      True
    """
    checked(plan, "receipt")
    found = params if isinstance(params, Digest) else digest(params)
    device = _device(params)
    paths = [leaf.path for leaf in plan.leaves]
    given = {
        leaf.path
        for leaf, keep in zip(plan.leaves, chosen(kept, paths, "kept"), strict=True)
        if keep or not leaf.selected
    }
    hold_against(plan, key, params, found, given, device)
    made = Receipt(
        name=plan.name,
        fingerprint=plan.fingerprint,
        seed=int(key) if isinstance(key, int | np.integer) else None,
        key=tuple(int(word) for word in key_words(as_key(key), plan.cut)),
        key_impl=plan.cut.impl,
        platform=device.platform,
        device=device.device_kind,
        processor=machine.processor(device.platform),
        versions={
            "jax": jax.__version__,
            "jaxlib": metadata.version("jaxlib"),
            "shardinit": __version__,
        },
        x64=bool(setting("jax_enable_x64")),
        xla_flags=machine.xla_flags(),
        not_mesh_free=_not_mesh_free(plan),
        leaves=tuple(
            LeafReceipt(path, *found.kinds[path], value)
            for path, value in found.leaves.items()
        ),
        root=found.root,
        kept=tuple(path for path in found.leaves if path in given),
        streams=plan.cut.streams,
    )
    return made.sealed


def verify_receipt(receipt: Receipt | str | os.PathLike[str], params: Any) -> Digest:
    """Checks that weights are those of a receipt, on whatever mesh they lie.

    Args:
      receipt: as it was made, or the file that it was saved to.
      params: the weights; or their ``Digest``.

    Returns:
      The digest of ``params``, equal to the receipt's.

    Raises:
      ReceiptMismatchError: leaves are missing or extra, or have another shape, dtype
        or value. Its ``differences`` name each of them.
      ReceiptFormatError: the file, or what was given, is no receipt.

    Example:
      >>> import jax, shardinit
      >>> plan = shardinit.plan(lambda key: {"w": jax.random.normal(key, (8, 32))})
      >>> params = shardinit.compile_plan(plan)(42)
      >>> receipt = shardinit.receipt(plan, 42, params)
      >>> shardinit.verify_receipt(receipt, params).root == receipt.root
      True
    """
    if isinstance(receipt, str | os.PathLike):
        receipt = Receipt.load(receipt)
    if not isinstance(receipt, Receipt):
        raise ReceiptFormatError(
            "receipt",
            f"got {type(receipt).__name__}",
            "a Receipt, or the file that one was saved to",
            "shardinit.receipt(plan, key, params) makes one",
        )
    found = params if isinstance(params, Digest) else digest(params)
    differences = compare(receipt, found)
    if differences:
        some = "; ".join(differences[:_SHOWN])
        if len(differences) > _SHOWN:
            some += f"; and {len(differences) - _SHOWN} more"
        count = len({leaf.path for leaf in receipt.leaves} | set(found.leaves))
        raise ReceiptMismatchError(
            f"receipt of {receipt.name!r}",
            f"{len(differences)} of {count} leaves differ: {some}",
            differences=differences,
        )
    return found


def compare(receipt: Receipt, found: Digest) -> list[str]:
    """Every leaf that differs and how; empty if the weights are the receipt's.

    Example:
      >>> import jax, shardinit
      >>> plan = shardinit.plan(lambda key: {"w": jax.random.normal(key, (8, 32))})
      >>> made = shardinit.receipt(plan, 42, shardinit.compile_plan(plan)(42))
      >>> compare(made, shardinit.digest({"w": jax.numpy.zeros((8, 32))}))
      ["'w' has other values"]
    """
    differences = []
    for leaf in receipt.leaves:
        if leaf.path not in found.leaves:
            differences.append(f"{leaf.path!r} is missing")
            continue
        shape, dtype = found.kinds[leaf.path]
        if shape != leaf.shape:
            differences.append(f"{leaf.path!r} has shape {shape}, not {leaf.shape}")
        elif dtype != leaf.dtype:
            differences.append(f"{leaf.path!r} has dtype {dtype}, not {leaf.dtype}")
        elif found.leaves[leaf.path] != leaf.digest:
            differences.append(f"{leaf.path!r} has other values")
    known = {leaf.path for leaf in receipt.leaves}
    extra = [path for path in found.leaves if path not in known]
    return differences + [f"{path!r} is extra" for path in extra]


def _not_mesh_free(plan: Plan) -> dict[str, str]:
    """By path, why a leaf's bits may depend on the mesh."""
    reasons = {}
    for leaf in plan.whole_leaves:
        if plan.whole_mode == "gspmd":
            reasons[leaf.path] = f"partitioned by the compiler (gspmd): {leaf.whole}"
        elif plan.cut.impl != keys.THREEFRY:
            reasons[leaf.path] = leaf.whole
    return reasons


def _device(params: Any) -> Any:
    """A device of this process that holds weights; else the default one."""
    for leaf in jax.tree.leaves(params):
        if isinstance(leaf, jax.Array) and leaf.sharding.addressable_devices:
            return next(iter(leaf.sharding.addressable_devices))
    return jax.local_devices()[0]
