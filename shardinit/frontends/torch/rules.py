"""Placements: what torch and ``transformers`` say of shards, as shardinit's rules.

A configuration of ``transformers`` carries a plan: module names with ``*`` for a
layer's number, and a style for each, such as ``colwise``. A style says which axis of a
weight is cut, counted from its end, so a rule is made for each kind of parameter that a
model has. DTensor writes a placement for each axis of the mesh, JAX mesh axes for each
axis of the array: the same thing, read the other way.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from jax.sharding import PartitionSpec

from shardinit.core.plan.entries import as_entry, mesh_axes
from shardinit.core.plan.rules import PathRules
from shardinit.errors import ShardingError
from shardinit.extras import needs

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)")

# Styles that hold whole parameters: they are about activations and gradients.
_WHOLE = """
    all_reduce ep_dispatch_experts ep_router gather isolated local local_params
    mla_kv_a_proj moe_identity_expert moe_tp_experts replicate replicated
    replicated_with_grad_allreduce sequence_parallel
""".split()


def rules_from_plan(
    model: Any,
    *,
    tp: str | tuple[str, ...] | None = "tp",
    ep: str | tuple[str, ...] | None = None,
    plan: Mapping[str, str] | None = None,
) -> PathRules:
    r"""The tensor-parallel plan of a model of ``transformers`` as ``PathRules``.

    Args:
      model: a configuration, which is built on the meta device, or a module.
      tp: mesh axes for ``tp_plan``; None leaves that out.
      ep: mesh axes for ``ep_plan``, which goes first where both name a parameter.
      plan: styles for ``tp`` by name, in the place of the model's own.

    Returns:
      A rule for each kind of parameter that is cut; all others lie whole. An axis that
      ``packed_colwise`` cuts in strides is cut in one piece: a program of JAX computes
      the same of it, but the shards are not those of a DTensor.

    Raises:
      ShardingError: a style that is unknown, or a model without a plan.

    Example:
      >>> import torch
      >>> from shardinit.frontends.torch import rules_from_plan
      >>> model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Linear(32, 8))
      >>> plan = {"0": "colwise", "1": "rowwise"}
      >>> for pattern, spec in rules_from_plan(model, plan=plan).rules:
      ...     print(pattern, tuple(spec))
      ^0\.weight$ ('tp',)
      ^0\.bias$ ('tp',)
      ^1\.weight$ (None, 'tp')
    """
    module = model if isinstance(model, torch.nn.Module) else _on_meta(model)
    styles = dict(plan) if plan is not None else _plan(module, "tp_plan")
    experts = _plan(module, "ep_plan") if ep is not None else {}
    if not styles and not experts:
        raise ShardingError(
            f"rules_from_plan({type(module).__name__})", "it has no tp_plan", "a plan"
        )
    rules: dict[str, PartitionSpec] = {}
    for name, parameter in module.named_parameters():
        for chosen, axes in ((experts, ep), (styles if tp is not None else {}, tp)):
            style = _style(name, chosen)
            if style is not None:
                axis = _axis(name, style, parameter.ndim)
                if axis is not None:
                    spec = PartitionSpec(*[None] * axis, as_entry(mesh_axes(axes)))
                    rules.setdefault(_pattern(name, chosen), spec)
                break
    return PathRules(rules.items())


def _on_meta(config: Any) -> torch.nn.Module:
    """The model of a configuration, without memory."""
    with needs("transformers", "transformers"):
        import transformers
    causal = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    kind = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
    with torch.device("meta"):
        return kind.from_config(config)


def _plan(module: torch.nn.Module, kind: str) -> dict[str, str]:
    """A plan that a module carries: its own with those of what it holds."""
    found = getattr(module, kind, None)
    if found is None:
        found = getattr(module, f"_{kind}", None)
    return dict(found or {})


def _style(name: str, plan: Mapping[str, str]) -> str | None:
    """The style of a parameter: of its own name, or of its module's."""
    for known in (name, _NUMBER.sub("*", name)):
        for inner in (known, known.rpartition(".")[0]):
            if inner in plan:
                return plan[inner]
    return None


def _axis(name: str, style: str, rank: int) -> int | None:
    """The axis of a parameter that a style cuts; None if it lies whole."""
    kind = style.removeprefix("local_")
    if kind == "grouped_gemm":
        return 0
    if kind.startswith("embedding_"):
        return {"embedding_rowwise": 0, "embedding_colwise": 1}[kind]
    if kind.startswith(("colwise", "packed_colwise")):
        return max(rank - 2, 0)
    if kind.startswith(("rowwise", "packed_rowwise")):
        return None if rank < 2 else rank - 1
    if kind in _WHOLE:
        return None
    raise ShardingError(
        f"parameter {name!r}",
        f"its style {style!r} is unknown",
        "colwise, rowwise, packed_…, embedding_…, grouped_gemm, " + ", ".join(_WHOLE),
    )


def _pattern(name: str, plan: Mapping[str, str]) -> str:
    """One pattern for the parameter of all layers, unless the plan names its layer."""
    named = {name, name.rpartition(".")[0]} & set(plan)
    parts = [name] if named else _NUMBER.split(name)
    return "^" + r"\d+".join(map(re.escape, parts)) + "$"


# ---- placements ----------------------------------------------------------------------


def spec_from_placements(
    placements: Sequence[Any], names: Sequence[str], rank: int | None = None
) -> PartitionSpec:
    """DTensor's placements as a ``PartitionSpec``.

    Args:
      placements: one for each axis of the device mesh: ``Shard`` or ``Replicate``.
      names: of these mesh axes.
      rank: of the tensor, for axes that are counted from its end.

    Raises:
      ShardingError: a placement that no spec can say: a sum that is still to be made,
        or a shard in strides.

    Example:
      >>> from torch.distributed.tensor import Replicate, Shard
      >>> from shardinit.frontends.torch import spec_from_placements
      >>> tuple(spec_from_placements([Replicate(), Shard(1)], ("data", "model")))
      (None, 'model')
    """
    axes: dict[int, list[str]] = {}
    for placement, name in zip(placements, names, strict=True):
        kind = type(placement).__name__
        if kind == "Replicate":
            continue
        if kind != "Shard":
            raise ShardingError(
                f"placement {placement!r} on mesh axis {name!r}",
                f"{kind} has no PartitionSpec",
                "Shard(dim) or Replicate()",
            )
        dim = placement.dim
        if dim < 0 and rank is None:
            raise ShardingError(f"placement {placement!r}", "got no rank", "rank=")
        axes.setdefault(dim + (rank or 0) if dim < 0 else dim, []).append(name)
    entries = (as_entry(axes.get(dim, ())) for dim in range(max(axes, default=-1) + 1))
    return PartitionSpec(*entries)


def placements_from_spec(
    spec: Iterable[str | tuple[str, ...] | None], names: Sequence[str]
) -> tuple[Any, ...]:
    """A ``PartitionSpec`` as DTensor's placements.

    Args:
      spec: mesh axes for each axis of the array.
      names: of the axes of the device mesh, in order.

    Returns:
      A placement for each axis of the device mesh.

    Raises:
      ShardingError: an axis that the mesh lacks, or several for one dimension in
        another order than the mesh's, which only a ``StridedShard`` could say.

    Example:
      >>> from jax.sharding import PartitionSpec as P
      >>> from shardinit.frontends.torch import placements_from_spec
      >>> placements_from_spec(P(None, "model"), ("data", "model"))
      (Replicate(), Shard(dim=1))
    """
    from torch.distributed.tensor import Replicate, Shard

    found: dict[str, Any] = {}
    for dim, entry in enumerate(spec):
        axes = mesh_axes(entry)
        unknown = [axis for axis in axes if axis not in names]
        if unknown:
            raise ShardingError(
                f"spec {spec}",
                f"the device mesh has no axis {unknown[0]!r}",
                str(names),
            )
        if sorted(axes, key=list(names).index) != list(axes):
            raise ShardingError(
                f"spec {spec}",
                f"axis {dim} is cut by {axes}, and the device mesh is {tuple(names)}",
                "mesh axes in the order of the device mesh",
                "Any other order is a StridedShard",
            )
        found |= dict.fromkeys(axes, Shard(dim))
    return tuple(found.get(name, Replicate()) for name in names)


def rules_from_module(module: torch.nn.Module) -> PathRules:
    """Where a module's DTensors lie, as ``PathRules``: after ``fully_shard``, say.

    Args:
      module: its parameters may be on the meta device. Device meshes need names.

    Raises:
      ShardingError: a placement that no spec can say.

    Example:
      >>> import torch
      >>> from shardinit.frontends.torch import rules_from_module
      >>> rules_from_module(torch.nn.Linear(8, 32)).rules  # nothing is sharded
      ()
    """
    from torch.distributed.tensor import DTensor

    kinds: dict[str, dict[PartitionSpec, list[str]]] = {}
    for name, parameter in module.named_parameters():
        if isinstance(parameter, DTensor):
            names = parameter.device_mesh.mesh_dim_names
            if names is None:
                raise ShardingError(
                    f"parameter {name!r}",
                    "its device mesh has no names",
                    "init_device_mesh(…, mesh_dim_names=)",
                )
            spec = spec_from_placements(parameter.placements, names, parameter.ndim)
            kind = kinds.setdefault(_pattern(name, {}), {})
            kind.setdefault(spec, []).append(name)
    rules: list[tuple[str, PartitionSpec]] = []
    for pattern, specs in kinds.items():
        if len(specs) == 1:
            rules.append((pattern, next(iter(specs))))
            continue
        for spec, names in specs.items():  # layers that lie in several ways
            rules += [(f"^{re.escape(name)}$", spec) for name in names]
    return PathRules(rules)
