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

import os
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
from shardinit.verify.digest.host import Digest
from shardinit.verify.held import hold_against
from shardinit.verify.receipt_record import LeafReceipt as LeafReceipt
from shardinit.verify.receipt_record import Receipt as Receipt
from shardinit.version import __version__

_SHOWN = 5


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
        # In a job a leaf may lie on other processes' devices alone.
        if isinstance(leaf, jax.Array) and leaf.sharding.addressable_devices:
            return next(iter(leaf.sharding.addressable_devices))
    return jax.local_devices()[0]
