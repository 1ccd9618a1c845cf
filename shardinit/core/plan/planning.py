"""From a function to its plan: traced, cut, placed, and held against what was asked."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import jax

from shardinit.core.cut.cut import Cut
from shardinit.core.init_fn import InitFn, as_init_fn
from shardinit.core.ir.jaxpr import collector_paused, setting
from shardinit.core.paths import chosen
from shardinit.core.plan.carried import carried_axes
from shardinit.core.plan.drawing import HostLeaves, drawing
from shardinit.core.plan.findings import refuse
from shardinit.core.plan.leaves import plan_leaves
from shardinit.core.plan.memory import check_memory
from shardinit.core.plan.mesh import AnyMesh
from shardinit.core.plan.options import PlanOptions, Select
from shardinit.core.plan.place import place
from shardinit.core.plan.placement import Placement
from shardinit.core.plan.plan import Plan
from shardinit.core.plan.rules import Rules
from shardinit.core.plan.tracing import traced
from shardinit.core.prng.root_key import KeyLike, RootKey, as_key, as_threefry
from shardinit.core.types import DType, Tree
from shardinit.errors import UnsupportedConfigError


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
        ``jax.random.key(0)``. A mapping of names to keys or seeds is for a function
        that takes such a dict: one key for each of its streams.
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
        has 128 values, and none beyond 2.9 standard deviations. What follows the draw
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


def make_plan(fn: object, key: RootKey, options: PlanOptions) -> Plan:
    """``plan`` for a key that is one and checked options; warns of nothing."""
    with collector_paused(), jax.transfer_guard("allow"):  # constants come to the host
        return _make_plan(fn, key, options)


def _make_plan(fn: object, key: RootKey, options: PlanOptions) -> Plan:
    _check_jit()
    cut, init_fn, prng, host = _cut(fn, key, options)
    axes = carried_axes(cut, init_fn.axes, options.opt_state)
    init_fn = replace(init_fn, axes=axes)
    picked = chosen(options.select, [x.path for x in cut.leaves])
    mesh, shardings, findings = place(cut, init_fn, options, picked)
    leaves, programs = plan_leaves(cut, shardings, picked)
    findings += drawing(cut, leaves, host)
    refuse(findings, options.strict, init_fn.name)
    if options.memory_limit is not None:
        check_memory(cut, leaves, options.memory_limit)
    return Plan(
        leaves=leaves,
        programs=programs,
        fingerprint=cut.fingerprint,
        mesh=mesh,
        name=init_fn.name,
        cut=cut,
        init_fn=init_fn,
        whole_mode=options.whole,
        findings=tuple(findings),
        prng=prng,
    )


def _cut(
    fn: Any, key: RootKey, options: PlanOptions
) -> tuple[Cut, InitFn, str | None, HostLeaves]:
    """A function cut; a plan's or a program's is taken as it is."""
    # By the method and not by class: `InitProgram` lives in a room above this one.
    if not hasattr(fn, "as_cut"):
        init_fn, prng = as_init_fn(fn).for_key(key), options.prng
        key = as_threefry(key) if prng is not None else key
        cut, host = traced(init_fn, key, prng, options.draw_dtype)
        return cut, init_fn, prng, host
    if options.draw_dtype is not None:
        raise UnsupportedConfigError(
            "draw_dtype",
            f"{type(fn).__name__}: its draws are settled already",
            "an init function",
            "Pass draw_dtype= where the function is planned or exported",
        )
    return fn.as_cut(), fn.as_init_fn(), getattr(fn, "prng", None), HostLeaves()


def _check_jit() -> None:
    if setting("jax_disable_jit"):
        raise UnsupportedConfigError(
            "jax_disable_jit",
            "it is True",
            "False: leaves are made by compiled programs",
            "Call shardinit outside jax.disable_jit(); the init function by itself, "
            "fn(key), can be debugged inside",
        )
