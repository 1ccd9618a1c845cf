"""Plan: what will be computed, where it will lie, and what it takes; no arrays yet.

A plan is abstract. It is made in the time of one trace, on a laptop as well as on the
cluster, for a mesh of devices or an ``AbstractMesh`` of thousands of chips that are
not there, and says for every leaf its sharding, its bytes on a device and which of the
few distinct programs makes it.
"""

from __future__ import annotations

import html
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import jax
from jax.sharding import NamedSharding

from shardinit.core.cut import cut as slicing
from shardinit.core.host_state import watched
from shardinit.core.init_fn import InitFn, as_init_fn
from shardinit.core.ir.jaxpr import setting
from shardinit.core.paths import chosen
from shardinit.core.plan import tables as plan_table
from shardinit.core.plan import text_table as table
from shardinit.core.plan.carried import carried_axes
from shardinit.core.plan.drawing import HostLeaves, drawing
from shardinit.core.plan.findings import Finding, as_text, refuse, warn
from shardinit.core.plan.leaves import (
    PlanLeaf,
    PlanProgram,
    group_programs,
    itemsize,
    plan_leaf,
)
from shardinit.core.plan.memory import check_memory
from shardinit.core.plan.mesh import AnyMesh
from shardinit.core.plan.options import PlanOptions, Select
from shardinit.core.plan.place import place
from shardinit.core.plan.placement import Placement
from shardinit.core.plan.rules import Rules
from shardinit.core.prng.root_key import KeyLike, as_key, as_threefry
from shardinit.core.types import DType, Init, Tree
from shardinit.errors import InitFnError, UnsupportedConfigError

_SCREEN = 30  # rows


@dataclass(frozen=True, eq=False)
class Plan:
    """An init function cut and placed; ``shardinit.compile_plan`` makes it run.

    Attributes:
      leaves: all leaves in the order of the pytree.
      programs: the distinct executables, each compiled once.
      fingerprint: hash of the function (not of the mesh, nor of any value), in hex.
      mesh: the mesh, or None.
      name: the model's name.
      findings: what a careful colleague would say of it.
      prng: ``"threefry"`` where every root key is made a threefry one.

    Example:
      >>> import jax, shardinit
      >>> plan = shardinit.plan(lambda key: {"w": jax.random.normal(key, (64, 32))})
      >>> [(leaf.path, leaf.shape) for leaf in plan.leaves], plan.total_bytes
      ([('w', (64, 32))], 8192)
    """

    leaves: tuple[PlanLeaf, ...]
    programs: tuple[PlanProgram, ...]
    fingerprint: str
    mesh: AnyMesh | None
    name: str
    cut: slicing.Cut = field(repr=False)
    init_fn: InitFn = field(repr=False)
    whole_mode: str = "replicate"
    findings: tuple[Finding, ...] = ()
    prng: str | None = None

    def as_cut(self) -> slicing.Cut:
        """The cut function: a plan can be planned again, for another mesh."""
        return self.cut

    def as_init_fn(self) -> InitFn:
        """The init function that was planned."""
        return self.init_fn

    def root_key(self, key: jax.Array) -> jax.Array:
        """The key that the function gets for a root key of the user's."""
        return key if self.prng is None else as_threefry(key)

    def selected(self, select: Select | None) -> Plan:
        """The same plan, in which other leaves are made.

        Args:
          select: globs or a predicate on the paths of the leaves to make.

        Example:
          >>> import jax, shardinit
          >>> init = lambda key: {"a": jax.random.normal(key), "b": jax.numpy.ones(3)}
          >>> plan = shardinit.plan(init).selected("b")
          >>> [leaf.path for leaf in plan.leaves if leaf.selected]
          ['b']
        """
        picked = chosen(select, [leaf.path for leaf in self.leaves])
        shardings = [leaf.sharding for leaf in self.leaves]
        leaves, programs = _leaves(self.cut, shardings, picked)
        return replace(self, leaves=leaves, programs=programs)

    def warn(self) -> None:
        """One Python warning for what weighs more than 1 MiB of each device."""
        sizes = {leaf.path: leaf.bytes_per_device for leaf in self.leaves}
        warn(self.findings, sizes)

    def abstract(self) -> Any:
        """The result as shapes, dtypes and shardings: a tree to restore into.

        Returns:
          What ``init`` returns (``InitFn.rebuild`` of the pytree, boxes and the user's
          own classes kept) with a ``jax.ShapeDtypeStruct`` for each leaf, those that
          ``select`` left out as well. In a plan without a mesh they have no sharding.

        Example:
          >>> import jax, shardinit
          >>> mesh = jax.make_mesh((1,), ("data",))
          >>> init = lambda key: {"w": jax.random.normal(key, (64, 32))}
          >>> shardinit.plan(init, mesh=mesh).abstract()["w"].shape
          (64, 32)
        """
        shapes = [
            jax.ShapeDtypeStruct(
                leaf.shape,
                leaf.dtype,
                sharding=planned.sharding,
                weak_type=leaf.weak_type,
            )
            for leaf, planned in zip(self.cut.leaves, self.leaves, strict=True)
        ]
        return self.init_fn.rebuild(jax.tree.unflatten(self.cut.tree, shapes))

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
        """The plan as a table: one row for the leaves of all layers, folded."""
        return plan_table.rows(self.leaves)

    def table(self) -> str:
        """The plan as text with a row for each leaf; ``print(plan)`` folds layers.

        Example:
          >>> import jax, shardinit
          >>> init = lambda key: [jax.numpy.ones((8, 32)), jax.random.normal(key)]
          >>> print(shardinit.plan(init).table())
          program  leaves  path  shape   dtype    sharding  bytes a device
          0        1       0     8x32    float32  -         1,024
          1        1       1     scalar  float32  -         4
        """
        return _as_text(plan_table.every(self.leaves))

    def screen(self) -> tuple[list[tuple[str, ...]], str]:
        """The largest of ``rows()``, as many as a screen has, and what to say of it."""
        rows, more = plan_table.largest(self.rows(), _SCREEN)
        said = f"… and {more:,} smaller rows: plan.table() has every leaf"
        return rows, said if more else ""

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

    def __repr__(self) -> str:
        return f"<Plan of {self.summary()}>"

    def __str__(self) -> str:
        rows, more = self.screen()
        parts = (self.summary(), _as_text(rows), more, as_text(self.findings))
        return "\n".join(filter(None, parts))

    def _repr_html_(self) -> str:
        rows, more = self.screen()
        body = table.as_html(plan_table.HEADER, rows)
        said = "".join(f"<li>{html.escape(str(x))}</li>" for x in self.findings)
        shown = f"<p>{html.escape(self.summary())}</p>{body}{html.escape(more)}"
        return f"{shown}<ul>{said}</ul>" if said else shown


def _as_text(rows: Sequence[tuple[str, ...]]) -> str:
    """A table without the last column, which is seldom filled, where it is empty."""
    last = None if any(row[-1] for row in rows) else -1
    return table.as_text(plan_table.HEADER[:last], [row[:last] for row in rows])


def plan(
    fn: object,
    *,
    key: KeyLike | None = None,
    mesh: AnyMesh | None = None,
    rules: Rules | None = None,
    out_shardings: Tree = None,
    select: Select | None = None,
    strict: bool | Collection[str] = False,
    whole: str = "replicate",
    indivisible: str = "error",
    memory_limit: int | None = None,
    prng: str | None = None,
    draw_dtype: DType = None,
    opt_rules: Rules | Placement | None = None,
    opt_state: Select | None = None,
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
      strict: refuse what ``findings`` warn of, all in one error; or a set of the kinds
        to refuse.
      whole: how such leaves are computed: ``"replicate"`` (whole on every device, the
        same bits on every mesh) or ``"gspmd"`` (partitioned by the compiler: less
        memory where it finds a way, bits that depend on the mesh).
      indivisible: what happens where an axis of a leaf does not divide by the mesh axes
        of its rule: ``"error"``, or ``"next"`` for the next rule, else whole.
      memory_limit: bytes that a device may hold: the shards of all leaves, and what
        the largest of the leaves that it computes in full takes while that runs;
        temporaries are not counted. None for no limit.
      prng: ``"threefry"`` makes the root key a threefry one, whatever its
        implementation, and so all that is derived from it; for a seed it is the key
        that ``jax.random.key(seed, impl="threefry2x32")`` gives.
      draw_dtype: ``"float32"`` makes each draw of a narrower float in that dtype, of
        the same key, and rounds it to its own inside the shard: a normal in bfloat16
        has 256 values, and none beyond 2.7 standard deviations. What follows the draw
        stays as it is. Values are then no longer those of plain jit.
      opt_rules: rules for optimizer state alone, on top of where its parameters lie:
        ``fsdp("data")`` shards it over mesh axes that they leave free (ZeRO-1), axis
        and path rules place what they know, ``Placement(rules or None,
        memory_kind="pinned_host")`` keeps it in another memory. Without them a leaf
        lies as the parameter that it mirrors.
      opt_state: globs or a predicate on paths: leaves that are optimizer state, beside
        those that lie in optax's own classes.

    Raises:
      InitFnError: the function cannot be cut.
      ShardingError: rules or shardings that do not fit.
      FindingsError: ``strict`` refuses what the findings say.
      WholeLeafError: a device would hold more than ``memory_limit``.
      UnsupportedConfigError: ``jax_threefry_partitionable`` or ``jax.jit`` is off, or
        ``draw_dtype`` is given for a function that is cut already.

    Example:
      >>> import jax, shardinit
      >>> mesh = jax.sharding.AbstractMesh((64,), ("data",))  # no device is needed
      >>> init = lambda key: {"w": jax.random.normal(key, (4096, 256))}
      >>> plan = shardinit.plan(init, mesh=mesh, rules=shardinit.fsdp("data"))
      >>> tuple(plan.leaves[0].sharding.spec), plan.bytes_per_device
      (('data',), 65536)
    """
    options = PlanOptions(
        mesh=mesh,
        rules=rules,
        out_shardings=out_shardings,
        select=select,
        strict=strict,
        whole=whole,
        indivisible=indivisible,
        memory_limit=memory_limit,
        prng=prng,
        draw_dtype=draw_dtype,
        opt_rules=opt_rules,
        opt_state=opt_state,
    )
    made = make_plan(fn, as_key(0 if key is None else key), options)
    made.warn()
    return made


def checked(given: object, where: str) -> Plan:
    """A plan; anything else is refused with the call that makes one.

    Raises:
      InitFnError: (a ``TypeError``) it is no plan.
    """
    if isinstance(given, Plan):
        return given
    raise InitFnError(
        where,
        f"got {type(given).__name__}",
        "a Plan",
        "Call shardinit.plan(fn, mesh=mesh) first",
    )


def make_plan(fn: Any, key: jax.Array, options: PlanOptions) -> Plan:
    """``plan`` for a key that is one and checked options; warns of nothing."""
    with jax.transfer_guard("allow"):  # constants come to the host
        return _make_plan(fn, key, options)


def _make_plan(fn: Any, key: jax.Array, options: PlanOptions) -> Plan:
    _check_jit()
    host = HostLeaves()
    if hasattr(fn, "as_cut"):
        if options.draw_dtype is not None:
            raise UnsupportedConfigError(
                "draw_dtype",
                f"{type(fn).__name__}: its draws are settled already",
                "an init function",
                "Pass draw_dtype= where the function is planned or exported",
            )
        cut, init_fn, prng = fn.as_cut(), fn.as_init_fn(), getattr(fn, "prng", None)
    else:
        _check_config()
        init_fn, prng = as_init_fn(fn), options.prng
        key = as_threefry(key) if prng is not None else key
        cut, host = _traced(init_fn, key, prng, options.draw_dtype)
    axes = carried_axes(cut, init_fn.axes, options.opt_state)
    init_fn = replace(init_fn, axes=axes)
    picked = chosen(options.select, [x.path for x in cut.leaves])
    mesh, shardings, findings = place(cut, init_fn, options, picked)
    leaves, programs = _leaves(cut, shardings, picked)
    findings += drawing(cut, leaves, host)
    made = Plan(
        leaves,
        programs,
        cut.fingerprint,
        mesh,
        init_fn.name,
        cut,
        init_fn,
        options.whole,
        tuple(findings),
        prng,
    )
    refuse(made.findings, options.strict, made.name)
    if options.memory_limit is not None:
        check_memory(cut, leaves, options.memory_limit)
    return made


def _leaves(
    cut: slicing.Cut, shardings: Sequence[NamedSharding | None], picked: Sequence[bool]
) -> tuple[tuple[PlanLeaf, ...], tuple[PlanProgram, ...]]:
    programs, numbers = group_programs(cut, shardings, picked)
    leaves = tuple(
        plan_leaf(leaf, cut, sharding, number, taken)
        for leaf, sharding, number, taken in zip(
            cut.leaves, shardings, numbers, picked, strict=True
        )
    )
    return leaves, programs


def _traced(
    init_fn: InitFn, key: jax.Array, prng: str | None, draw_dtype: DType
) -> tuple[slicing.Cut, HostLeaves]:
    """The function cut, and the leaves that the host's state reaches.

    Where the function took something of that state, it is traced once more, with that
    state moved, and what came out otherwise is named.
    """
    root = jax.ShapeDtypeStruct(key.shape, key.dtype)

    def cut(fn: Init) -> slicing.Cut:
        if prng is None:
            return slicing.cut(fn, root, draw_dtype)
        with jax.default_prng_impl("threefry2x32"):  # keys that the function makes
            return slicing.cut(fn, root, draw_dtype)

    def changed() -> list[str]:
        fn = init_fn.fn if init_fn.again is None else init_fn.again().fn
        other = cut(
            lambda key: fn(key)
        )  # another function, or JAX gives the same trace
        pairs = zip(made.leaves, other.leaves, strict=True)
        return [
            one.path
            for one, two in pairs
            if replace(made, leaves=(one,)).fingerprint
            != replace(other, leaves=(two,)).fingerprint
        ]

    with watched() as host:
        made = cut(init_fn.fn)
    random, by_process = (), ()
    if host.moved or init_fn.draws_on_host:
        random = changed()
    if host.asked or init_fn.asks_process:
        with watched(index_offset=1):
            by_process = [path for path in changed() if path not in set(random)]
    return made, HostLeaves(tuple(random), tuple(by_process))


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
