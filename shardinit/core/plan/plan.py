"""Plan: what will be computed, where it will lie, and what it takes; no arrays yet.

A plan is abstract. It is made in the time of one trace, on a laptop as well as on the
cluster, for a mesh of devices or an ``AbstractMesh`` of thousands of chips that are
not there, and says for every leaf its sharding, its bytes on a device and which of the
few distinct programs makes it.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from shardinit.core.cut import cut as slicing
from shardinit.core.init_fn import InitFn, as_init_fn
from shardinit.core.ir.jaxpr import is_key, setting
from shardinit.core.paths import chosen
from shardinit.core.plan import sharding as sh
from shardinit.core.plan import tables as plan_table
from shardinit.core.plan import text_table as table
from shardinit.core.run.arguments import as_key
from shardinit.errors import ShardingError, UnsupportedConfigError, WholeLeafError


@dataclass(frozen=True)
class PlanLeaf:
    """One leaf of a plan.

    Attributes:
      path: its key path, ``/``-joined.
      shape: its global shape; dtype: its dtype.
      sharding: where it lies; None in a plan without a mesh.
      bytes_per_device: bytes of one shard.
      program: index into ``plan.programs``; -1 for a leaf made on the host (a
        constant, or keys).
      whole: why every device computes the full leaf; empty when it computes its shard.
      selected: False for a leaf that ``select`` left out.
    """

    path: str
    shape: tuple[int, ...]
    dtype: Any
    sharding: NamedSharding | None
    bytes_per_device: int
    program: int
    whole: str
    selected: bool


@dataclass(frozen=True, eq=False)
class PlanProgram:
    """One executable: a leaf program at a sharding.

    Attributes:
      program: what it computes.
      shapes: global shape of each result.
      shardings: of each result; None in a plan without a mesh.
      leaves: how many leaves (or groups of leaves with one whole program) it makes.
    """

    program: slicing.Program
    shapes: tuple[tuple[int, ...], ...]
    shardings: tuple[NamedSharding | None, ...]
    leaves: int

    @property
    def whole(self) -> str:
        """Why it is evaluated whole on every device; empty if it is not."""
        why = self.program.replicated_reason
        return "" if why is None else why.text


@dataclass(frozen=True, eq=False)
class Plan:
    """An init function cut and placed; ``shardinit.compile_plan`` makes it run.

    Attributes:
      leaves: all leaves in the order of the pytree.
      programs: the distinct executables, each compiled once.
      fingerprint: hash of the function (not of the mesh, nor of any value), in hex.
      mesh: the mesh, or None.
      name: the model's name.
    """

    leaves: tuple[PlanLeaf, ...]
    programs: tuple[PlanProgram, ...]
    fingerprint: str
    mesh: Any
    name: str
    cut: slicing.Cut = field(repr=False)
    init_fn: InitFn = field(repr=False)
    whole_mode: str = "replicate"

    def as_cut(self) -> slicing.Cut:
        """The cut function: a plan can be planned again, for another mesh."""
        return self.cut

    def as_init_fn(self) -> InitFn:
        """The init function that was planned."""
        return self.init_fn

    @cached_property
    def total_bytes(self) -> int:
        """Bytes of all selected leaves, each counted once."""
        return sum(
            math.prod(x.shape) * itemsize(x.dtype) for x in self.leaves if x.selected
        )

    @cached_property
    def bytes_per_device(self) -> int:
        """Bytes of the selected leaves' shards on one device."""
        return sum(x.bytes_per_device for x in self.leaves if x.selected)

    @cached_property
    def parameter_count(self) -> int:
        """Number of elements of all selected leaves."""
        return sum(math.prod(x.shape) for x in self.leaves if x.selected)

    @property
    def whole_leaves(self) -> tuple[PlanLeaf, ...]:
        """Leaves that every device must compute in full."""
        return tuple(x for x in self.leaves if x.whole and x.selected)

    def rows(self) -> list[tuple[str, ...]]:
        """The plan as a table: one row for each program and shape, with an example."""
        return plan_table.rows(self.leaves)

    def summary(self) -> str:
        """One line: counts and bytes."""
        devices = f" on {dict(self.mesh.shape)}" if self.mesh is not None else ""
        whole = len(self.whole_leaves)
        return (
            f"{self.name}: {len(self.leaves):,} leaves, {self.parameter_count:,} "
            f"elements, {self.total_bytes:,} bytes{devices}, "
            f"{self.bytes_per_device:,} bytes a device, {len(self.programs)} programs"
            + (f", {whole} leaves computed whole" if whole else "")
        )

    def __str__(self) -> str:
        return f"{self.summary()}\n{table.as_text(plan_table.HEADER, self.rows())}"

    def _repr_html_(self) -> str:
        body = table.as_html(plan_table.HEADER, self.rows())
        return f"<p>{html.escape(self.summary())}</p>{body}"


def itemsize(dtype: Any) -> int:
    """Bytes of one element; of its key data for typed keys."""
    if is_key(dtype):
        data = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct((), dtype))
        return 4 * math.prod(data.shape)
    return np.dtype(dtype).itemsize


def plan(
    fn: Any,
    *,
    key: Any = None,
    mesh: Any = None,
    rules: sh.Rules | None = None,
    out_shardings: Any = None,
    select: str | Iterable[str] | Callable[[str], bool] | None = None,
    strict: bool = False,
    whole: str = "replicate",
    memory_limit: int | None = None,
) -> Plan:
    """Cuts ``fn`` and says where each leaf will lie; allocates nothing.

    Args:
      fn: ``key -> pytree of arrays``, an ``InitFn``, an ``InitProgram`` or a ``Plan``
        (which is not traced again).
      key: a key whose type counts (its value does not); default
        ``jax.random.key(0)``.
      mesh: a ``Mesh`` or ``AbstractMesh``; None plans without shardings.
      rules: ``AxisRules``, ``PathRules`` or ``fsdp(...)``; default: axis names that
        are mesh axes, else ``fsdp()`` over all axes.
      out_shardings: a pytree prefix of shardings instead of rules.
      select: globs over leaf paths, or a predicate: the leaves to initialise.
      strict: refuse leaves that every device must compute whole.
      whole: how such leaves are computed: ``"replicate"`` (whole on every device, the
        same bits on every mesh) or ``"gspmd"`` (partitioned by the compiler: less
        memory where it finds a way, bits that depend on the mesh).
      memory_limit: bytes that the leaves of one whole program may take together on
        every device while it runs, temporaries not counted; None for no limit.

    Raises:
      InitFnError: the function cannot be cut.
      ShardingError: rules or shardings that do not fit.
      WholeLeafError: ``strict`` and there are whole leaves, or some take more than
        ``memory_limit``.
      UnsupportedConfigError: ``jax_threefry_partitionable`` or ``jax.jit`` is off.
    """
    if whole not in ("replicate", "gspmd"):
        raise ValueError(f"whole={whole!r}; expected 'replicate' or 'gspmd'")
    _check_jit()
    sh.check_mesh(mesh)
    if rules is not None and out_shardings is not None:
        raise ShardingError("rules and out_shardings", "both were given", "one of them")
    if hasattr(fn, "as_cut"):
        cut, init_fn = fn.as_cut(), fn.as_init_fn()
    else:
        _check_config()
        init_fn = as_init_fn(fn)
        key = as_key(0 if key is None else key)
        cut = slicing.cut(init_fn.fn, jax.ShapeDtypeStruct(key.shape, key.dtype))
    infos = leaf_infos(cut, init_fn.axes)
    if out_shardings is not None:
        shardings: list[Any] = sh.from_tree(out_shardings, infos, cut.tree, mesh)
        mesh = mesh if mesh is not None else shardings[0].mesh if shardings else None
    elif mesh is not None:
        shardings = list(sh.resolve(infos, mesh, rules))
    elif rules is not None:
        raise ShardingError("rules", "given without a mesh", "mesh=...")
    else:
        shardings = [None] * len(infos)
    picked = chosen(select, [x.path for x in cut.leaves])
    programs, numbers = _group(cut, shardings, picked)
    leaves = tuple(
        _plan_leaf(leaf, cut, sharding, number, taken)
        for leaf, sharding, number, taken in zip(
            cut.leaves, shardings, numbers, picked, strict=True
        )
    )
    made = Plan(
        leaves,
        programs,
        cut.fingerprint,
        mesh,
        init_fn.name,
        cut,
        init_fn,
        whole,
    )
    _check_whole(made, strict, memory_limit)
    return made


def _check_whole(made: Plan, strict: bool, memory_limit: int | None) -> None:
    if strict and made.whole_leaves:
        first = made.whole_leaves[0]
        raise WholeLeafError(
            f"leaf {first.path!r}",
            f"it must be computed whole on every device ({first.whole}); "
            f"{len(made.whole_leaves)} such leaves in all",
            "initialisers that shard (strict=True)",
            "Use another initialiser, or strict=False and pay for the full leaf",
        )
    if memory_limit is None:
        return
    for group in gather_results(made.cut):
        first = made.leaves[group[0]]
        needed = sum(
            math.prod(made.leaves[i].shape) * itemsize(made.leaves[i].dtype)
            for i in group
        )
        if first.whole and first.program >= 0 and needed > memory_limit:
            raise WholeLeafError(
                f"leaf {first.path!r}",
                f"every device must compute it whole ({first.whole}): {needed:,} bytes",
                f"at most memory_limit={memory_limit:,} bytes",
                "Raise memory_limit, or use an initialiser that can be windowed",
            )


def _check_jit() -> None:
    if setting("jax_disable_jit"):
        raise UnsupportedConfigError(
            "jax_disable_jit",
            "it is True",
            "False: leaves are made by compiled programs",
            "Call shardinit outside jax.disable_jit(); the init function by itself, "
            "fn(key), can be debugged inside",
        )


def _check_config() -> None:
    if not setting("jax_threefry_partitionable"):
        raise UnsupportedConfigError(
            "jax_threefry_partitionable",
            "it is False",
            "True (JAX's default)",
            "Without it a random number depends on the size of the whole array, so "
            "no device could make its shard alone. Remove the setting",
        )


def leaf_infos(cut: slicing.Cut, axes: Any) -> list[sh.LeafInfo]:
    """What sharding rules look at, one for each leaf; checks the axis names."""
    names: list[Any] = [None] * len(cut.leaves)
    if axes is not None:
        try:
            names = cut.tree.flatten_up_to(axes)
        except (ValueError, TypeError) as error:
            raise ShardingError(
                "InitFn.axes",
                f"its structure differs from the result's ({error})"[:300],
                f"a tuple of axis names, or None, for each of the {len(cut.leaves)} "
                f"leaves",
            ) from error
    infos = []
    for leaf, name in zip(cut.leaves, names, strict=True):
        if name is not None and len(name) != len(leaf.shape):
            raise ShardingError(
                f"leaf {leaf.path!r}",
                f"axis names {name} for the shape {leaf.shape}",
                "one name (or None) for each dimension",
            )
        infos.append(sh.LeafInfo(leaf.path, leaf.shape, itemsize(leaf.dtype), name))
    return infos


def _group(
    cut: slicing.Cut, shardings: list[Any], picked: list[bool]
) -> tuple[tuple[PlanProgram, ...], list[int]]:
    """Leaf programs by sharding: what is compiled, and which leaf uses which.

    A program with several results is compiled when any of its leaves is selected.
    """
    together = gather_results(cut)
    numbers = [-1] * len(cut.leaves)
    found: dict[Any, int] = {}
    programs: list[list[Any]] = []
    for group in together:
        if not any(picked[i] for i in group):
            continue
        index = cut.leaves[group[0]].program
        places = tuple(shardings[i] for i in group)
        shapes = tuple(cut.leaves[i].shape for i in group)
        kind = (index, shapes, places)
        if kind not in found:
            found[kind] = len(programs)
            programs.append([cut.programs[index], shapes, places, 0])
        programs[found[kind]][3] += 1
        for i in group:
            numbers[i] = found[kind]
    return tuple(PlanProgram(*p) for p in programs), numbers


def gather_results(cut: slicing.Cut) -> list[list[int]]:
    """Leaves made by one run of one program together, in the order of its results."""
    groups: list[list[int]] = []
    waiting: dict[Any, list[int]] = {}
    for number, leaf in enumerate(cut.leaves):
        if leaf.program < 0:
            continue
        if cut.programs[leaf.program].results == 1:
            groups.append([number])
            continue
        run = (leaf.program, tuple(map(id, leaf.operands)))
        group = waiting.get(run)
        if group is None or leaf.result == 0:
            group = waiting[run] = []
            groups.append(group)
        group.append(number)
    return groups


def _plan_leaf(
    leaf: slicing.LeafCut, cut: slicing.Cut, sharding: Any, number: int, taken: bool
) -> PlanLeaf:
    shard = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
    return PlanLeaf(
        leaf.path,
        leaf.shape,
        leaf.dtype,
        sharding,
        math.prod(shard) * itemsize(leaf.dtype),
        number,
        cut.replicated_text(leaf),
        taken,
    )
