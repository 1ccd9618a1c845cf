"""The way back: arrays as tensors, and a module on the meta device filled by windows.

``to_torch`` hands memory over without a copy. ``load_into`` needs no arrays at all:
each rank computes the rows of its own shard, wherever FSDP2 or another plan put them,
and writes them into the module's memory piece by piece.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import torch
from jax.sharding import NamedSharding

from shardinit.core.ir.jaxpr import is_key
from shardinit.core.paths import nearest
from shardinit.core.prng.root_key import KeyLike
from shardinit.core.region import Region
from shardinit.core.run.lazy import LazyArray, LazyTree
from shardinit.core.run.lazy import open as open_lazily
from shardinit.core.types import Tree
from shardinit.errors import ShardingError, StructureMismatchError
from shardinit.frontends.torch.rules import placements_from_spec
from shardinit.frontends.torch.shards import boxes_of, pieces

# Floats that numpy has from ml_dtypes: torch takes their bits.
_BITS = {
    "bfloat16": torch.int16,
    "float8_e4m3fn": torch.uint8,
    "float8_e4m3fnuz": torch.uint8,
    "float8_e5m2": torch.uint8,
    "float8_e5m2fnuz": torch.uint8,
    "float8_e8m0fnu": torch.uint8,
}


def to_torch(
    tree: Tree, device_mesh: Any = None, *, ties: Mapping[str, str] | None = None
) -> Any:
    """Arrays as tensors of the same memory.

    Do not write to a tensor while its array is in use: JAX holds arrays for immutable.

    Args:
      tree: a pytree of arrays. Of numpy's and lazy ones the tensors are copies.
      device_mesh: torch's ``DeviceMesh`` with the names of the array's mesh axes, of
        which each rank is a process of JAX with one device: tensors are ``DTensor``s.
      ties: for a flat dict, further names of a tensor and the name that it has there;
        they are given the same tensor.

    Returns:
      The tree with a ``torch.Tensor`` or ``DTensor`` for each array.

    Raises:
      ShardingError: an array lies on several devices of this process, or otherwise than
        the device mesh can say.
      TypeError: a dtype that torch lacks.

    Example:
      >>> import jax, shardinit
      >>> from shardinit.frontends.torch import to_torch
      >>> w = jax.random.normal(jax.random.key(0), (8, 32))
      >>> to_torch({"w": w})["w"].data_ptr() == w.unsafe_buffer_pointer()
      True
    """
    if isinstance(tree, LazyTree):
        tree = dict(tree)
    made = jax.tree.map(lambda leaf: _tensor(leaf, device_mesh), tree)
    for name, first in (ties or {}).items():
        made[name] = made[first]
    return made


def _tensor(leaf: Any, device_mesh: Any) -> torch.Tensor:
    if isinstance(leaf, jax.Array):
        if is_key(leaf.dtype):
            leaf = jax.random.key_data(leaf)
        return (
            _from_jax(leaf) if device_mesh is None else _distributed(leaf, device_mesh)
        )
    array = np.asarray(leaf)
    out = torch.empty(array.shape, dtype=_torch_dtype(array.dtype))
    _numpy(out)[...] = _bits(array)
    return out


def _from_jax(array: jax.Array) -> torch.Tensor:
    """An array of one device, without a copy."""
    if len(array.sharding.device_set) > 1:
        if not array.is_fully_replicated:
            raise ShardingError(
                f"an array of shape {array.shape}",
                f"it lies on {len(array.sharding.device_set)} devices",
                "one device, or device_mesh= for a DTensor",
                "jax.device_put(array, jax.devices()[0]) gathers it",
            )
        array = array.addressable_data(0)
    dtype = _torch_dtype(array.dtype)
    if _BITS.get(array.dtype.name) == torch.uint8:
        # JAX 0.10 has these floats in DLPack, and torch 2.13 does not take them.
        return torch.from_dlpack(_bytes(array)).view(dtype)
    return torch.from_dlpack(array)


def _bytes(array: jax.Array) -> Any:
    """The bytes of an array of 8-bit floats: the same memory on the host."""
    if next(iter(array.devices())).platform == "cpu":
        return _Writable(np.asarray(array).view(np.uint8))
    return jax.lax.bitcast_convert_type(array, "uint8")


class _Writable:
    """Gives numpy's memory on as it is: by DLPack it hands out none that it may not."""

    def __init__(self, array: np.ndarray):
        self._array = array
        self.__array_interface__ = {
            **array.__array_interface__,
            "data": (array.__array_interface__["data"][0], False),
        }

    def __dlpack__(self, **options: Any) -> Any:
        return np.asarray(self).__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._array.__dlpack_device__()


def _distributed(array: jax.Array, device_mesh: Any) -> torch.Tensor:
    """An array of several processes as a DTensor of this one's shard."""
    from torch.distributed.tensor import DTensor, Replicate

    names = device_mesh.mesh_dim_names or ()
    shards = array.addressable_shards
    if len(shards) != 1:
        raise ShardingError(
            f"an array of shape {array.shape}",
            f"this process holds {len(shards)} shards of it",
            "one: a process for each device, as torch has it",
        )
    sharding = array.sharding
    placements = tuple(Replicate() for _ in names)
    if isinstance(sharding, NamedSharding):
        placements = placements_from_spec(sharding.spec, names)
    elif not array.is_fully_replicated:
        raise ShardingError(f"{sharding}", "it has no mesh axes", "a NamedSharding")
    expected = boxes_of(tuple(array.shape), device_mesh, placements)
    held = Region.of_slices(shards[0].index, array.shape)
    spans = [(s, s + n) for s, n in zip(held.start, held.shape, strict=True)]
    if [[span] for span in spans] != expected:
        raise ShardingError(
            f"an array of shape {array.shape}",
            f"this process holds {spans}",
            f"{expected}, as its rank in the device mesh has it",
            "Order the processes of both meshes alike",
        )
    return DTensor.from_local(
        _from_jax(shards[0].data),
        device_mesh,
        placements,
        run_check=False,
        shape=torch.Size(array.shape),
        stride=_strides(array.shape),
    )


def load_into(
    module: torch.nn.Module,
    source: object,
    key: KeyLike | None = None,
    *,
    device: torch.device | str | None = None,
    memory_limit: int | None = None,
) -> torch.nn.Module:
    """Fills a module with initial values; each rank computes its own shards only.

    Args:
      module: on the meta device, as it is or after ``fully_shard`` or another plan of
        DTensors; what holds memory already is overwritten in place.
      source: what ``shardinit.open`` takes (an init function, a program, a plan), whose
        leaves have the names of the module's tensors; or what it returns.
      key: a key or an int seed; not where ``source`` is open.
      device: where tensors go that are on the meta device; default the device mesh's,
        or the CPU.
      memory_limit: as ``shardinit.open`` takes it.

    Returns:
      The module. Tensors that it ties stay one tensor. What is a buffer of the module
      and no leaf keeps its value if it has one.

    Raises:
      StructureMismatchError: names, shapes or dtypes that do not fit.
      ShardingError: a placement that is no shard.

    Example:
      >>> import torch
      >>> from shardinit.frontends import torch as from_torch
      >>> fn = from_torch.init_fn(torch.nn.Linear, 64, 256)
      >>> with torch.device("meta"):
      ...     model = torch.nn.Linear(64, 256)
      >>> from_torch.load_into(model, fn, 0).weight.shape
      torch.Size([256, 64])
    """
    ties = dict(getattr(source, "ties", {}))
    if isinstance(source, LazyTree):
        lazy = source
        ties |= dict(getattr(lazy.init_fn, "ties", {}))
    else:
        lazy = open_lazily(source, 0 if key is None else key, memory_limit=memory_limit)
    if key is None and not isinstance(source, LazyTree):
        raise TypeError("load_into: got no key; expected a key or an int seed")
    tensors = dict(_named(module))
    _check_names(tensors, lazy, ties)
    made: dict[int, torch.Tensor] = {}
    state: dict[str, torch.Tensor] = {}
    for name, old in tensors.items():
        leaf = lazy.get(ties.get(name, name)) if _has(lazy, ties, name) else None
        if id(old) not in made and leaf is not None:
            made[id(old)] = _filled(name, old, leaf, device)
        if id(old) in made:
            state[name] = made[id(old)]
    _put(module, tensors, state)
    return module


def _has(lazy: LazyTree, ties: Mapping[str, str], name: str) -> bool:
    return ties.get(name, name) in lazy


def _named(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _check_names(
    tensors: Mapping[str, torch.Tensor], lazy: LazyTree, ties: Mapping[str, str]
) -> None:
    """Refuses tensors that would stay without values, and values without a tensor."""
    known = {id(t) for name, t in tensors.items() if _has(lazy, ties, name)}
    lacking = [n for n, t in tensors.items() if id(t) not in known and t.is_meta]
    unexpected = [path for path in lazy if path not in tensors]
    if lacking:
        raise StructureMismatchError(
            f"tensor {lacking[0]!r} of the module",
            f"it has no values ({len(lacking):,} such tensors)",
            nearest(lacking[0], lazy),
        )
    if unexpected:
        raise StructureMismatchError(
            f"leaf {unexpected[0]!r}",
            f"the module has no such tensor ({len(unexpected):,} such leaves)",
            nearest(unexpected[0], tensors),
        )


def _filled(
    name: str, old: torch.Tensor, leaf: LazyArray, device: torch.device | str | None
) -> torch.Tensor:
    """A tensor like ``old`` with a leaf's values; of a shard, those of the shard."""
    from torch.distributed.tensor import DTensor

    _check_leaf(name, old, leaf)
    local, boxes = old.detach(), [[(0, n)] for n in old.shape]
    if isinstance(old, DTensor):
        boxes = boxes_of(tuple(old.shape), old.device_mesh, old.placements)
        local = old.to_local().detach()
        device = device or old.device_mesh.device_type
    if local.is_meta:
        local = torch.empty(local.shape, dtype=local.dtype, device=device or "cpu")
    if tuple(local.shape) != tuple(sum(b - a for a, b in runs) for runs in boxes):
        raise ShardingError(
            f"tensor {name!r}", f"its shard has shape {tuple(local.shape)}", f"{boxes}"
        )
    _fill(local, leaf, boxes)
    if not old.is_meta:
        return old
    made = local
    if isinstance(old, DTensor):
        made = DTensor.from_local(
            local,
            old.device_mesh,
            old.placements,
            run_check=False,
            shape=old.shape,
            stride=old.stride(),
        )
    if isinstance(old, torch.nn.Parameter):
        return torch.nn.Parameter(made, old.requires_grad)
    return made


def _check_leaf(name: str, old: torch.Tensor, leaf: LazyArray) -> None:
    if tuple(old.shape) != leaf.shape:
        raise StructureMismatchError(
            f"tensor {name!r}",
            f"the leaf has shape {leaf.shape}",
            f"{tuple(old.shape)}",
        )
    got = _torch_dtype(leaf.dtype)
    # Integers and floats of 64 bits are JAX's of 32, unless x64 is set.
    wider = torch.promote_types(got, old.dtype) == old.dtype and old.dtype.itemsize == 8
    if got != old.dtype and not wider:
        raise StructureMismatchError(
            f"tensor {name!r}",
            f"the leaf has dtype {leaf.dtype}",
            f"{old.dtype}: values are never cast unasked",
            "Record with dtype=, or call module.to(dtype) first",
        )


def _fill(
    local: torch.Tensor, leaf: LazyArray, boxes: Sequence[Sequence[tuple[int, int]]]
) -> None:
    """Writes a leaf's windows into a tensor, a piece at a time."""
    for start, shape, into in pieces(boxes, leaf.dtype.itemsize):
        if 0 in shape:
            continue
        window = leaf.read(start, shape)
        if local.device.type == "cpu" and local.dtype == _torch_dtype(leaf.dtype):
            _numpy(local)[into] = _bits(window)
        else:
            staged = torch.empty(shape, dtype=_torch_dtype(leaf.dtype))
            _numpy(staged)[...] = _bits(window)
            with torch.no_grad():
                local[into].copy_(staged)


def _put(
    module: torch.nn.Module,
    tensors: Mapping[str, torch.Tensor],
    state: Mapping[str, torch.Tensor],
) -> None:
    """Puts new tensors into the module; those that were overwritten are there."""
    new = {name: t for name, t in state.items() if t is not tensors[name]}
    modules = dict(module.named_modules(remove_duplicate=False))
    for name in list(new):
        at, _, last = name.rpartition(".")
        if last in modules[at]._buffers:  # load_state_dict knows only persistent ones
            modules[at]._buffers[last] = new.pop(name)
    # Its hooks are how FSDP2 learns that a parameter is another.
    module.load_state_dict(new, strict=False, assign=True)


# ---- dtypes --------------------------------------------------------------------------


def _torch_dtype(dtype: Any) -> torch.dtype:
    """Torch's dtype of the same name.

    Raises:
      TypeError: there is none.
    """
    name, kind = np.dtype(dtype).name, np.dtype(dtype).kind
    found = getattr(torch, name, None)
    # Of int4 and its like torch has the name alone.
    if not isinstance(found, torch.dtype) or (kind == "V" and name not in _BITS):
        raise TypeError(f"dtype {name}: torch has none of that name")
    return found


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    """A tensor's memory as numpy's, its bits where numpy lacks the dtype."""
    bits = _BITS.get(str(tensor.dtype).removeprefix("torch."))
    return (tensor if bits is None else tensor.view(bits)).detach().numpy()


def _bits(array: np.ndarray) -> np.ndarray:
    """What is written into ``_numpy`` of a tensor of the array's dtype."""
    if array.dtype.name not in _BITS:
        return array
    return array.view(np.int16 if array.dtype.itemsize == 2 else np.uint8)


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a contiguous tensor, in elements."""
    found, step = [], 1
    for size in reversed(shape):
        found.append(step)
        step *= size
    return tuple(reversed(found))
