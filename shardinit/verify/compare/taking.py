"""Snapshots taken: of a function, a plan or a program, of a receipt, of arrays."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from shardinit.core import platform as machine
from shardinit.core.cut.cut import Cut, LeafCut
from shardinit.core.cut.sources import Constant, Keys, Table
from shardinit.core.ir.jaxpr import is_key
from shardinit.core.plan.leaves import PlanLeaf
from shardinit.core.plan.options import PlanOptions
from shardinit.core.plan.plan import Plan
from shardinit.core.plan.planning import make_plan
from shardinit.core.prng import derivation as keys
from shardinit.core.prng.root_key import KeyLike, as_key
from shardinit.core.types import DType
from shardinit.progress import counted, progress
from shardinit.verify.compare.snapshot import LeafSnapshot, Snapshot
from shardinit.verify.digest.host import Digest
from shardinit.verify.inspect.inspect import WHOLE_BYTES, law_of
from shardinit.verify.inspect.reading import Reader
from shardinit.verify.inspect.windows import layout
from shardinit.verify.receipt_record import Receipt
from shardinit.version import __version__

WINDOWS = "windows"
FULL = "full"


def snapshot(
    fn: object,
    key: KeyLike = 0,
    *,
    values: bool = True,
    memory_limit: int = WHOLE_BYTES,
) -> Snapshot:
    """The snapshot of an init function at a key.

    Args:
      fn: ``key -> pytree of arrays``, an ``InitFn``, an ``InitProgram`` or a ``Plan``,
        whose shardings are kept.
      key: a key or an int seed.
      values: whether windows of each leaf are computed and hashed, those of
        ``shardinit.inspect``: all of a leaf of at most 2^18 elements.
      memory_limit: bytes that a leaf may take which has to be computed in full.

    Raises:
      InitFnError: the function cannot be cut.
      TypeError: the key is none, or of another type than the plan's.

    Example:
      >>> import jax
      >>> made = snapshot(lambda key: {"w": jax.random.normal(key, (8, 32))}, 42)
      >>> made.leaves[0].law, made.leaves[0].derived
      ('normal 1', 'root')
    """
    with jax.transfer_guard("allow"):
        root = as_key(key)
        plan = fn if isinstance(fn, Plan) else make_plan(fn, root, PlanOptions())
        numbers = [i for i, leaf in enumerate(plan.leaves) if leaf.selected]
        rooted = plan.root_key(root)
        reader = Reader(plan, rooted, numbers, memory_limit=memory_limit)
        hashes = _values(plan, reader, len(numbers)) if values else {}
        made = tuple(_leaves(plan, reader, numbers, hashes))
    return Snapshot(
        name=plan.name,
        leaves=made,
        fingerprint=plan.fingerprint,
        key=tuple(int(word) for word in reader.key),
        impl=plan.cut.impl,
        mesh=plan.mesh_shape,
        made_by=made_by(),
    )


def made_by() -> dict[str, str]:
    """What decides bits here beside the function and the key."""
    platform = jax.local_devices()[0].platform
    return {
        "platform": platform,
        "device": jax.local_devices()[0].device_kind,
        "processor": " ".join(machine.processor(platform)),
        "flags": " ".join(machine.xla_flags()),
        "jax": jax.__version__,
        "shardinit": __version__,
    }


def of_receipt(receipt: Receipt) -> Snapshot:
    """The snapshot of a receipt: structure, key, and digests of all values."""
    return Snapshot(
        name=receipt.name,
        leaves=tuple(
            LeafSnapshot(x.path, x.shape, x.dtype, values={FULL: x.digest})
            for x in receipt.leaves
        ),
        fingerprint=receipt.fingerprint,
        key=receipt.key,
        impl=receipt.key_impl,
        made_by={
            "platform": receipt.platform,
            "device": receipt.device,
            "processor": " ".join(receipt.processor),
            "flags": " ".join(receipt.xla_flags),
            "jax": receipt.versions.get("jax", ""),
            "shardinit": receipt.versions.get("shardinit", ""),
        },
    )


def of_digest(found: Digest, name: str = "checkpoint") -> Snapshot:
    """The snapshot of a digest: structure and digests of all values."""
    leaves = tuple(
        LeafSnapshot(path, *found.kinds[path], values={FULL: value})
        for path, value in found.leaves.items()
    )
    return Snapshot(name, leaves)


def of_arrays(arrays: Mapping[str, Any], name: str = "checkpoint") -> Snapshot:
    """The snapshot of arrays by path: structure, and the windows that a pin hashes.

    Example:
      >>> import jax
      >>> fn = lambda key: {"w": jax.random.normal(key, (8, 32))}
      >>> params = jax.jit(fn)(jax.random.key(0))
      >>> of_arrays(params).leaves[0].values == snapshot(fn, 0).leaves[0].values
      True
    """
    made = []
    with progress("hash", unit="leaves") as report:
        advance = counted(report, len(arrays))
        for path, array in arrays.items():
            made.append(_of_array(path, array))
            advance(1)
    return Snapshot(name, tuple(made))


def _of_array(path: str, array: Any) -> LeafSnapshot:
    if is_key(array.dtype):
        return LeafSnapshot(path, tuple(array.shape), str(array.dtype))
    windows = layout(array.shape).regions
    parts = [np.asarray(array[window.slices]) for window in windows]
    kind = np.dtype(array.dtype).name
    return LeafSnapshot(path, tuple(array.shape), kind, values={WINDOWS: _hash(parts)})


def _values(plan: Plan, reader: Reader, count: int) -> dict[int, str]:
    """By leaf number, the hash of its windows; none where they are not read."""
    with progress("hash", unit="leaves") as report:
        return dict(_hashes(plan, reader, counted(report, count)))


def _hashes(
    plan: Plan, reader: Reader, advance: Callable[[int], None]
) -> Iterator[tuple[int, str]]:
    for seen in reader.read():
        advance(1)
        shape = plan.leaves[seen.number].shape
        if seen.unread:
            continue
        place = layout(shape)
        size = (len(place.starts), int(np.prod(place.shape, dtype=np.int64)))
        if seen.exact and seen.windows.size == int(np.prod(shape, dtype=np.int64)):
            array = seen.windows.reshape(shape)  # read in full
            parts = [array[window.slices] for window in place.regions]
        else:
            # A leaf of one number is read as a single element, and of a large leaf
            # nothing but windows is.
            parts = [np.broadcast_to(seen.windows, size)]
        yield seen.number, _hash(parts)


def _hash(parts: Iterable[Any]) -> str:
    sha = hashlib.sha256()
    for part in parts:
        sha.update(np.ascontiguousarray(part).tobytes())
    return sha.hexdigest()[:32]


def _leaves(
    plan: Plan, reader: Reader, numbers: Sequence[int], hashes: dict[int, str]
) -> Iterable[LeafSnapshot]:
    cut = plan.cut
    derivations = [d for i in numbers for d in cut.leaves[i].operands]
    digests = _derivation_digests(derivations)
    bits = _random_bits(cut, reader, numbers)
    for number in numbers:
        leaf, placed = cut.leaves[number], plan.leaves[number]
        drawn = [d for d in leaf.operands if not _is_scalar(d)]
        law = str(law_of(cut, number, reader.words[number]))
        yield LeafSnapshot(
            path=leaf.path,
            shape=leaf.shape,
            dtype=_dtype_name(leaf.dtype),
            sharding=_where(placed),
            law=None if law == "unknown" else law,
            function=_function(cut, leaf),
            keys=_hash_text([digests[id(d)] for d in drawn]),
            derived=", ".join(_described(d) for d in drawn[:2]) or "no key",
            bits=bits.get(number),
            values={WINDOWS: hashes[number]} if number in hashes else {},
        )


def _where(leaf: PlanLeaf) -> str | None:
    if leaf.sharding is None:
        return None
    kind = leaf.memory_kind
    return str(leaf.sharding.spec) + (f" in {kind}" if kind else "")


def _dtype_name(dtype: DType) -> str:
    # NumPy knows no dtype of keys: ``np.dtype`` of ``key<fry>`` is a TypeError.
    return str(dtype) if is_key(dtype) else np.dtype(dtype).name


def _is_scalar(derived: keys.Derivation) -> bool:
    """Whether it is a scalar that was made an operand, and no key."""
    return derived.op == "words" and derived.words == 1


def _function(cut: Cut, leaf: LeafCut) -> str:
    """Hash of what makes a leaf of its keys."""
    source = leaf.source
    if isinstance(source, Constant):
        return _hash([source.array])
    if isinstance(source, Keys):
        return "keys"
    if isinstance(source, Table):
        return source.program.digest[:32]
    scalars = [d.data.tolist() for d in source.operands if _is_scalar(d)]
    return _hash_text([cut.programs[source.program].digest, source.result, scalars])


def _hash_text(facts: Any) -> str:
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:32]


def _derivation_digests(wanted: Iterable[keys.Derivation]) -> dict[int, str]:
    """A hash of each derivation, equal for those that do the same to the root key."""
    found: dict[int, str] = {}
    for node in keys.topological(wanted):
        parents = [found[id(parent)] for parent in node.parents]
        sha = hashlib.sha256()
        sha.update(repr((node.op, node.impl, node.words, parents, node.shape)).encode())
        sha.update(node.data.tobytes())
        found[id(node)] = sha.hexdigest()[:32]
    return found


def _described(derived: keys.Derivation) -> str:
    """How a key comes from the root key, as one would write it; shortened."""
    steps: list[str] = []
    node = derived
    while node.parents and len(steps) < 8:
        width = keys.words_per_key(node.impl)
        if node.op == "split":
            steps.append(f"split{list(node.shape)}")
        elif node.op == "fold_in" and node.data.size == 1:
            steps.append(f"fold_in({int(node.data[0])})")
        elif node.op == "take" and node.words == width:
            steps.append(f"[{int(node.data[0]) // width}]")
        else:
            steps.append(f"{node.op} of {node.words // width} keys")
        node = node.parents[0]
    steps.append("constant" if node.op == "words" else node.op)
    return ".".join(reversed(steps)).replace(".[", "[")


def _random_bits(cut: Cut, reader: Reader, numbers: Sequence[int]) -> dict[int, str]:
    """By leaf number, a hash of the first bits that its keys give; threefry only."""
    if cut.impl != keys.THREEFRY:
        return {}
    found: dict[int, np.ndarray] = {}
    for number in numbers:
        start, parts = 0, []
        for derived in cut.leaves[number].operands:
            part = reader.words[number][start : start + derived.words]
            start += derived.words
            if not _is_scalar(derived) and part.size % 2 == 0:
                parts.append(part.reshape(-1, 2))
        if parts:
            found[number] = np.concatenate(parts)
    if not found:
        return {}
    together = jax.random.wrap_key_data(
        jnp.asarray(np.concatenate(list(found.values()))), impl=keys.THREEFRY
    )
    drawn = np.asarray(jax.vmap(lambda key: jax.random.bits(key, (4,)))(together))
    ends = np.cumsum([len(x) for x in found.values()])
    parts = np.split(drawn, ends[:-1])
    return {n: _hash([part]) for n, part in zip(found, parts, strict=True)}
