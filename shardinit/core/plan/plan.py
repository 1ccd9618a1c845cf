"""Plan: what will be computed, where it will lie, and what it takes; no arrays yet.

A plan is abstract. It is made in the time of one trace, on a laptop as well as on the
cluster, for a mesh of devices or an ``AbstractMesh`` of thousands of chips that are
not there, and says for every leaf its sharding, its bytes on a device and which of the
few distinct programs makes it.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import jax

from shardinit.core.cut.cut import Cut
from shardinit.core.init_fn import InitFn
from shardinit.core.paths import chosen, named_leaves
from shardinit.core.plan import tables as plan_table
from shardinit.core.plan import text_table as table
from shardinit.core.plan.findings import Finding, as_text, warn
from shardinit.core.plan.leaves import (
    PlanLeaf,
    PlanProgram,
    plan_leaves,
)
from shardinit.core.plan.mesh import AnyMesh
from shardinit.core.plan.options import Select
from shardinit.core.prng.root_key import RootKey, as_threefry
from shardinit.core.types import Tree
from shardinit.errors import InitFnError
from shardinit.short import plural

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
      findings: what is wrong with it, or worth knowing of it.
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
    cut: Cut = field(repr=False)
    init_fn: InitFn = field(repr=False)
    whole_mode: str = "replicate"
    findings: tuple[Finding, ...] = ()
    prng: str | None = None

    def as_cut(self) -> Cut:
        """The cut function: a plan can be planned again, for another mesh.

        Example:
          >>> import jax, shardinit
          >>> plan = shardinit.plan(lambda key: {"w": jax.random.normal(key, (64, 32))})
          >>> [leaf.path for leaf in plan.as_cut().leaves]
          ['w']
        """
        return self.cut

    def as_init_fn(self) -> InitFn:
        """The init function that was planned.

        Example:
          >>> import jax, shardinit
          >>> plan = shardinit.plan(lambda key: {"w": jax.random.normal(key, (64, 32))})
          >>> plan.as_init_fn()(jax.random.key(0))["w"].shape
          (64, 32)
        """
        return self.init_fn

    def root_key(self, key: RootKey) -> RootKey:
        """The key that the function gets for a root key of the user's.

        Example:
          >>> import jax, shardinit
          >>> plan = shardinit.plan(jax.random.normal, prng="threefry")
          >>> jax.random.key_impl(plan.root_key(jax.random.key(0, impl="rbg")))
          'threefry2x32'
        """
        return key if self.prng is None else as_threefry(key)

    # It keeps what it has computed in the instance's dict, past the frozen class.
    @cached_property
    def unboxed(self) -> dict[str, str]:
        """The path of each leaf by its path without a box around it.

        A function of the user's own may give its arrays in boxes. Those have a place
        in the plan's paths, and none in checkpoints' and digests'.
        """
        own = [leaf.path for leaf in self.leaves]
        stand_ins = [jax.ShapeDtypeStruct((), "float32") for _ in own]
        named = named_leaves(jax.tree.unflatten(self.cut.tree, stand_ins))
        return {path: x for (path, _), x in zip(named, own, strict=True)}

    def paths_of(self, found: Iterable[str]) -> list[str]:
        """The plan's own paths for those of a checkpoint or a digest.

        Orbax itself, given boxes, writes them as dicts of a ``value``.

        Args:
          found: the paths; those that are none of its leaves stay as they are.

        Example:
          >>> import jax, shardinit
          >>> plan = shardinit.plan(lambda key: {"w": jax.random.normal(key)})
          >>> plan.paths_of(["w/value", "other"])
          ['w', 'other']
        """
        boxed = {f"{leaf.path}/value": leaf.path for leaf in self.leaves}
        own = {leaf.path: leaf.path for leaf in self.leaves}
        known = boxed | self.unboxed | own
        return [known.get(x, x) for x in found]

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
        leaves, programs = plan_leaves(self.cut, shardings, picked)
        return replace(self, leaves=leaves, programs=programs)

    def warn(self) -> None:
        """One Python warning for what weighs more than 1 MiB of each device.

        Example:
          >>> import jax, shardinit
          >>> plan = shardinit.plan(lambda key: {"w": jax.random.normal(key)})
          >>> plan.warn()  # this one has nothing to warn of
        """
        sizes = {leaf.path: leaf.bytes_per_device for leaf in self.leaves}
        warn(self.findings, sizes)

    def abstract(self) -> Tree:
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
        """The size of each mesh axis; empty in a plan without a mesh.

        Example:
          >>> import jax, shardinit
          >>> mesh = jax.sharding.AbstractMesh((2, 4), ("data", "model"))
          >>> shardinit.plan(jax.random.normal, mesh=mesh).mesh_shape
          {'data': 2, 'model': 4}
        """
        return {} if self.mesh is None else dict(self.mesh.shape)

    @cached_property
    def total_bytes(self) -> int:
        """Bytes of all selected leaves, each counted once."""
        return sum(x.nbytes for x in self.leaves if x.selected)

    @cached_property
    def bytes_per_device(self) -> int:
        """Bytes of the selected leaves' shards in one device's own memory.

        Example:
          >>> import jax, shardinit
          >>> mesh = jax.sharding.AbstractMesh((2,), ("data",))
          >>> init = lambda key: jax.random.normal(key, (64, 32))
          >>> plan = shardinit.plan(init, mesh=mesh, rules=shardinit.fsdp(min_bytes=0))
          >>> plan.total_bytes, plan.bytes_per_device
          (8192, 4096)
        """
        chosen = (x for x in self.leaves if x.selected)
        return sum(x.bytes_per_device for x in chosen if not x.memory_kind)

    @cached_property
    def host_bytes_per_device(self) -> int:
        """Bytes of a device's shards in other memory, such as ``"pinned_host"``.

        Example:
          >>> import jax, shardinit
          >>> mesh = jax.sharding.AbstractMesh((2,), ("data",))
          >>> init = lambda key: jax.random.normal(key, (64, 32))
          >>> host = shardinit.Placement(jax.P("data"), memory_kind="pinned_host")
          >>> rules = shardinit.PathRules([("", host)])
          >>> plan = shardinit.plan(init, mesh=mesh, rules=rules)
          >>> plan.bytes_per_device, plan.host_bytes_per_device
          (0, 4096)
        """
        held = sum(x.bytes_per_device for x in self.leaves if x.selected)
        return held - self.bytes_per_device

    @cached_property
    def parameter_count(self) -> int:
        """Number of elements of all selected leaves.

        Example:
          >>> import jax, shardinit
          >>> plan = shardinit.plan(lambda key: {"w": jax.random.normal(key, (64, 32))})
          >>> plan.parameter_count
          2048
        """
        return sum(x.size for x in self.leaves if x.selected)

    @property
    def whole_leaves(self) -> tuple[PlanLeaf, ...]:
        """Leaves that every device must compute in full.

        Example:
          >>> import jax, shardinit
          >>> mesh = jax.sharding.AbstractMesh((2,), ("data",))
          >>> init = lambda key: jax.numpy.sort(jax.random.normal(key, (64, 32)))
          >>> [leaf.shape for leaf in shardinit.plan(init, mesh=mesh).whole_leaves]
          [(64, 32)]
        """
        return tuple(x for x in self.leaves if x.is_replicated and x.selected)

    def rows(self) -> list[tuple[str, ...]]:
        """The plan as a table: one row for the leaves of all layers, folded.

        Example:
          >>> import jax, shardinit
          >>> plan = shardinit.plan(lambda key: {"w": jax.random.normal(key, (64, 32))})
          >>> plan.rows()
          [('0', '1', 'w', '64x32', 'float32', '-', '8,192', '')]
        """
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
        """The largest of ``rows()``, as many as a screen has, and what to say of it.

        Example:
          >>> import jax, shardinit
          >>> plan = shardinit.plan(lambda key: jax.random.normal(key, (64, 32)))
          >>> rows, more = plan.screen()
          >>> len(rows), more
          (1, '')
        """
        rows, more = plan_table.largest(self.leaves, _SCREEN)
        said = (
            f"… and {more:,} smaller rows: plan.table() and plan --json have every leaf"
        )
        return rows, said if more else ""

    def summary(self) -> str:
        """One line: counts and bytes.

        Example:
          >>> import jax, shardinit
          >>> plan = shardinit.plan(lambda key: {"w": jax.random.normal(key, (64, 32))})
          >>> plan.summary().partition(", ")[2]
          '2,048 elements, 8,192 bytes, 8,192 bytes a device, 1 program'
        """
        devices = f" on {self.mesh_shape}" if self.mesh is not None else ""
        whole, host = len(self.whole_leaves), self.host_bytes_per_device
        return (
            f"{self.name}: {plural(len(self.leaves), 'leaf')}, "
            f"{plural(self.parameter_count, 'element')}, "
            f"{self.total_bytes:,} bytes{devices}, "
            f"{self.bytes_per_device:,} bytes a device"
            + (f" and {host:,} in its host's memory" if host else "")
            + f", {plural(len(self.programs), 'program')}"
            + (f", {plural(whole, 'leaf')} computed whole" if whole else "")
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
