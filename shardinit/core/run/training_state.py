"""What a restored tree means to a training state: parameters, and state made of them.

State of an optimizer mirrors parameters, and some of it begins as a copy of them. A
checkpoint may have the parameters alone, without the key under which the training state
has them.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from shardinit.core.cut.cut import LeafCut
from shardinit.core.cut.sources import Run, Source
from shardinit.core.init_fn import AxisNames
from shardinit.core.plan.leaves import names_of
from shardinit.core.plan.plan import Plan
from shardinit.core.prng import derivation as keys
from shardinit.core.run.renames import Lines
from shardinit.errors import StructureMismatchError


def parameters_alone(plan: Plan, present: Mapping[str, Any]) -> Lines:
    """The line that puts parameters which are there alone where the plan has them.

    Args:
      plan: of the whole result.
      present: what is there, by path.

    Returns:
      ``** -> params/**`` or the like; nothing where a path is the plan's already, the
      plan has no optimizer state, or the paths do not all lie below one of its keys.
    """
    states = _optimizer_state(plan)
    params = {leaf.path for leaf in plan.leaves} - set(states)
    if not states or not present or params.intersection(plan.paths_of(present)):
        return ()
    first = next(iter(present))
    ends = (first, first.removesuffix("/value"))  # Orbax itself writes boxes so
    every = [*plan.unboxed, *params]
    outer = {x.removesuffix(e) for x in every for e in ends if x.endswith(f"/{e}")}
    fits = [
        above
        for above in outer
        if params.issuperset(plan.paths_of(above + path for path in present))
    ]
    return f"** -> {fits[0]}**" if len(fits) == 1 else ()


def repeats(plan: Plan, present: Mapping[str, Any]) -> dict[str, str]:
    """Missing state of an optimizer that repeats a parameter which is there.

    A full initialisation would give it the values of a new parameter. A constant one
    (zeros of a bias) may be a moment's too: it is repeated where others of its field
    are.
    """
    states, leaves = _optimizer_state(plan), {x.path: x for x in plan.cut.leaves}
    fields = _repeating_fields(states, leaves)
    lacking = {
        path: param
        for path, param in states.items()
        if path not in present and (not param or param in present)
    }
    copies = {
        path: param
        for path, param in lacking.items()
        if param and _field(path, param) in fields
    }
    for path in lacking:
        if path not in copies and is_drawn(leaves[path].source):
            raise _made_of_parameters(path, lacking[path])
    return copies


def _made_of_parameters(path: str, param: str) -> StructureMismatchError:
    """An error for missing state that parameters make, of which some are there."""
    return StructureMismatchError(
        f"leaf {path!r}",
        "it is missing, and the optimizer makes it of the parameters"
        + (f", of which {param!r} is there" if param else ""),
        "state that depends on no parameter, or that repeats one",
        "Make the state of the restored parameters: tx.init(params)",
    )


def _optimizer_state(plan: Plan) -> dict[str, str]:
    """The leaves of optimizer state, each with its parameter's path if it has one."""
    names = names_of(plan.cut, plan.init_fn.axes)
    return {
        leaf.path: name.mirrors.path if name.mirrors is not None else ""
        for leaf, name in zip(plan.cut.leaves, names, strict=True)
        if isinstance(name, AxisNames) and name.optimizer
    }


def _repeating_fields(
    states: Mapping[str, str], leaves: Mapping[str, LeafCut]
) -> set[str]:
    """The fields of optimizer state that begin as their parameters."""
    drawn = {x: param for x, param in states.items() if is_drawn(leaves[x].source)}
    return {
        _field(path, param)
        for path, param in drawn.items()
        if param and _equal(leaves[path], leaves[param])
    }


def _field(path: str, param: str) -> str:
    """The way to the tree of an optimizer that repeats the tree of the parameters."""
    keys, inner = path.split("/"), param.split("/")
    ends = zip(reversed(keys), reversed(inner), strict=False)
    common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], ends))
    return "/".join(keys[: len(keys) - common])


def is_drawn(source: Source) -> bool:
    """Whether a leaf depends on the key."""
    nodes = keys.topological(source.operands)
    return any(node.op == "root" for node in nodes)


def _equal(leaf: LeafCut, param: LeafCut) -> bool:
    """Whether two leaves are one value: of one program and the same keys."""
    one, other = leaf.source, param.source
    if not (isinstance(one, Run) and isinstance(other, Run)):
        return False
    same_keys = list(map(id, one.operands)) == list(map(id, other.operands))
    return same_keys and one.computation == other.computation
