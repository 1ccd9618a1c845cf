"""Where the leaves of a function lie: the mesh, the rules that count, the shardings."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from jax.sharding import Mesh, NamedSharding

from shardinit.core.cut.cut import Cut
from shardinit.core.init_fn import InitFn
from shardinit.core.plan import sharding as sh
from shardinit.core.plan.carried import rules_of_context
from shardinit.core.plan.findings import Finding
from shardinit.core.plan.leaf_info import Choice, LeafInfo, Placed
from shardinit.core.plan.leaves import leaf_infos
from shardinit.core.plan.mesh import AnyMesh
from shardinit.core.plan.options import PlanOptions
from shardinit.core.plan.placing import placing, unplaced
from shardinit.core.plan.rules import AxisRules, Rules
from shardinit.errors import ShardingError


def place(
    cut: Cut, init_fn: InitFn, options: PlanOptions, selected: Sequence[bool]
) -> tuple[AnyMesh | None, list[NamedSharding | None], list[Finding]]:
    """The mesh, the sharding of each leaf (None without a mesh), and what is to say.

    Args:
      cut: the function.
      init_fn: what its front end knows of it.
      options: of the plan.
      selected: for each leaf whether it will be made.

    Raises:
      ShardingError: rules or shardings that do not fit.
    """
    infos = leaf_infos(cut, init_fn.axes)
    rules, given = _rules(options, init_fn), options.out_shardings is not None
    if given:
        shardings = sh.from_tree(options.out_shardings, infos, cut.tree, options.mesh)
        mesh = options.mesh or (shardings[0].mesh if shardings else None)
        chosen = [(sharding, Choice()) for sharding in shardings]
    else:
        mesh = _mesh(options, rules, infos)
        if mesh is None:
            found = unplaced(jax.device_count(), len(infos))
            return None, [None] * len(infos), list(found)
        opt_rules, indivisible = options.opt_rules, options.indivisible
        chosen = sh.choose(infos, mesh, rules, indivisible, opt_rules)
    placed = [
        Placed(info, sharding, choice, taken)
        for info, (sharding, choice), taken in zip(infos, chosen, selected, strict=True)
    ]
    found = list(placing(placed, mesh, rules, given)) if mesh is not None else []
    return mesh, [x.sharding for x in placed], found


def _rules(options: PlanOptions, init_fn: InitFn) -> Rules | None:
    """The plan's rules; those of the framework's own context where it has none."""
    if options.rules is not None or options.out_shardings is not None:
        return options.rules
    if options.mesh is None:
        return None
    context = init_fn.context_rules
    rules = rules_of_context(init_fn.axes) if context is None else context()
    return AxisRules(rules) if rules else None


def _mesh(
    options: PlanOptions, rules: Rules | None, infos: Sequence[LeafInfo]
) -> AnyMesh | None:
    """The mesh that rules count for: the plan's own, or that of the model."""
    if options.mesh is None and rules is not None:
        raise ShardingError("rules", "given without a mesh", "mesh=...")
    mesh = options.mesh or _own_mesh(infos)
    if mesh is None and options.opt_rules is not None:
        raise ShardingError("opt_rules", "given without a mesh", "mesh=...")
    return mesh


def _own_mesh(infos: Sequence[LeafInfo]) -> AnyMesh | None:
    """The mesh on which the model places itself, if it does on devices."""
    for leaf in infos:
        if leaf.own_mesh is not None:
            return leaf.own_mesh
        # An abstract mesh has no devices on which the plan could run.
        if leaf.stated is not None and isinstance(leaf.stated.mesh, Mesh):
            return leaf.stated.mesh
    return None
