"""Plan: what will be computed, where it will lie, and what it takes; no arrays yet.

A plan is abstract. It is made in the time of one trace, on a laptop as well as on the
cluster, for a mesh of devices or an ``AbstractMesh`` of thousands of chips that are
not there, and says for every leaf its sharding, its bytes on a device and which of the
few distinct programs makes it.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jax
from jax.sharding import NamedSharding

from shardinit.core.cut import cut as slicing
from shardinit.core.init_fn import InitFn, as_init_fn
from shardinit.core.ir.jaxpr import setting
from shardinit.core.paths import chosen
from shardinit.core.plan import sharding as sh
from shardinit.core.plan import tables as plan_table
from shardinit.core.plan import text_table as table
from shardinit.core.plan.leaves import (
    PlanLeaf,
    PlanProgram,
    gather_results,
    group_programs,
    itemsize,
    leaf_infos,
    plan_leaf,
)
from shardinit.core.plan.mesh import AnyMesh
from shardinit.core.plan.options import PlanOptions, Select
from shardinit.core.plan.rules import LeafInfo, Rules
from shardinit.core.prng.root_key import KeyLike, as_key
from shardinit.errors import ShardingError, UnsupportedConfigError, WholeLeafError


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
    mesh: AnyMesh | None
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

    @property
    def mesh_shape(self) -> dict[str, int]:
        """The size of each mesh axis; empty in a plan without a mesh."""
        return {} if self.mesh is None else dict(self.mesh.shape)

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
        devices = f" on {self.mesh_shape}" if self.mesh is not None else ""
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


def plan(
    fn: Any,
    *,
    key: KeyLike | None = None,
    mesh: AnyMesh | None = None,
    rules: Rules | None = None,
    out_shardings: Any = None,
    select: Select | None = None,
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
    options = PlanOptions(
        mesh=mesh,
        rules=rules,
        out_shardings=out_shardings,
        select=select,
        strict=strict,
        whole=whole,
        memory_limit=memory_limit,
    )
    return make_plan(fn, as_key(0 if key is None else key), options)


def make_plan(fn: Any, key: jax.Array, options: PlanOptions) -> Plan:
    """``plan`` for a key that is one and options that were checked."""
    _check_jit()
    if hasattr(fn, "as_cut"):
        cut, init_fn = fn.as_cut(), fn.as_init_fn()
    else:
        _check_config()
        init_fn = as_init_fn(fn)
        cut = slicing.cut(init_fn.fn, jax.ShapeDtypeStruct(key.shape, key.dtype))
    mesh, shardings = _place(cut, leaf_infos(cut, init_fn.axes), options)
    picked = chosen(options.select, [x.path for x in cut.leaves])
    programs, numbers = group_programs(cut, shardings, picked)
    leaves = tuple(
        plan_leaf(leaf, cut, sharding, number, taken)
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
        options.whole,
    )
    _check_whole(made, options)
    return made


def _place(
    cut: slicing.Cut, infos: Sequence[LeafInfo], options: PlanOptions
) -> tuple[AnyMesh | None, Sequence[NamedSharding | None]]:
    """The mesh, and one sharding for each leaf."""
    mesh, rules = options.mesh, options.rules
    if options.out_shardings is not None:
        placed = sh.from_tree(options.out_shardings, infos, cut.tree, mesh)
        return mesh or (placed[0].mesh if placed else None), placed
    if mesh is not None:
        return mesh, sh.resolve(infos, mesh, rules)
    if rules is not None:
        raise ShardingError("rules", "given without a mesh", "mesh=...")
    return None, [None] * len(infos)


def _check_whole(made: Plan, options: PlanOptions) -> None:
    memory_limit = options.memory_limit
    if options.strict and made.whole_leaves:
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
