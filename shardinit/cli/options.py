"""Options of the commands that plan: ``PlanOptions``, as typed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import typer

from shardinit.cli import arguments
from shardinit.cli.outcomes import UsageError
from shardinit.progress import progress

if TYPE_CHECKING:
    from shardinit.core.plan.mesh import AnyMesh
    from shardinit.core.plan.options import PlanOptions
    from shardinit.core.plan.plan import Plan

Seed = Annotated[
    Any,
    typer.Option(
        parser=arguments.parse_seed,
        metavar="SEED",
        help="Seed of the root key, or of each stream of a model that has several, as "
        "params=0,dropout=1.",
    ),
]
Rules = Annotated[
    str | None,
    typer.Option(
        help="Logical axes to mesh axes, such as embed=data,mlp=model; + joins mesh "
        "axes, nothing keeps an axis whole. Or fsdp, fsdp:data+model: by size alone."
    ),
]
DrawDtype = Annotated[
    Literal["float32", "float64"] | None,
    typer.Option(help="Draw narrower floats in this dtype, and round."),
]
OptRules = Annotated[
    str | None,
    typer.Option(
        help="Rules for optimizer state alone, on top of where its parameters lie; as "
        "--rules, such as fsdp:data."
    ),
]
OptMemory = Annotated[
    str | None,
    typer.Option(help="Kind of memory for optimizer state, such as pinned_host."),
]
OptState = Annotated[
    list[str] | None,
    typer.Option(help="A glob over paths of optimizer state; may be repeated."),
]
Select = Annotated[
    list[str] | None,
    typer.Option(help="A glob over leaf paths, as 'layers_3/**'; may be repeated."),
]
Strict = Annotated[
    str | None,
    typer.Option(
        help="Refuse these kinds of findings, joined by commas; 'all' refuses warnings."
    ),
]
Indivisible = Annotated[
    Literal["error", "next"],
    typer.Option(
        help="Where an axis does not divide by the mesh axes of its rule: an error, or "
        "the next rule for it, else whole."
    ),
]
MemoryLimit = Annotated[
    str | None, typer.Option(help="What a device may hold, such as 16GiB.")
]
Prng = Annotated[
    Literal["threefry"] | None,
    typer.Option(help="Derive all keys from a threefry one, whatever the model's."),
]


class Asked(NamedTuple):
    """What was typed beside the model and the mesh.

    Optimizer state has rules, a kind of memory and globs of its own. Of the seed only
    the names of its streams count.
    """

    rules: str | None
    select: list[str] | None
    strict: str | None
    indivisible: str
    memory_limit: str | None
    prng: str | None
    draw_dtype: str | None = None
    of_state: tuple[str | None, str | None, list[str] | None] = (None, None, None)
    seed: int | dict[str, int] = 0


def placing_of(
    rules: str | None,
    opt_rules: str | None,
    opt_memory: str | None,
    opt_state: list[str] | None,
) -> dict[str, Any]:
    """Where leaves shall lie, as ``shardinit.plan`` takes it.

    Raises:
      ShardingError: rules that do not read like rules.
    """
    from shardinit.core.plan.placement import Placement

    state: Any = arguments.parse_rules(opt_rules, "--opt-rules")
    if opt_memory is not None:
        state = Placement(state, memory_kind=opt_memory)
    ours = arguments.parse_rules(rules)
    return {"rules": ours, "opt_rules": state, "opt_state": opt_state}


def plan_options(mesh: AnyMesh | None, asked: Asked) -> PlanOptions:
    """What was typed as ``PlanOptions``.

    Raises:
      UsageError: rules, a size or a kind that does not read like one.
    """
    from shardinit.core.plan.findings import KINDS
    from shardinit.core.plan.options import PlanOptions

    strict: bool | set[str] = asked.strict == "all"
    if asked.strict is not None and not strict:
        strict = {kind.strip() for kind in asked.strict.split(",")}
        if not strict <= set(KINDS):
            kinds = f"'all', or kinds of findings: {', '.join(KINDS)}"
            raise UsageError("--strict", repr(asked.strict), kinds)
    limit = None
    if asked.memory_limit is not None:
        limit = arguments.parse_bytes(asked.memory_limit, "--memory-limit")
    return PlanOptions(
        mesh=mesh,
        select=asked.select,
        strict=strict,
        indivisible=asked.indivisible,
        memory_limit=limit,
        prng=asked.prng,
        draw_dtype=asked.draw_dtype,
        **placing_of(asked.rules, *asked.of_state),
    )


def planned(fn: object, mesh: AnyMesh | None, asked: Asked) -> Plan:
    """The plan, and its warning.

    Raises:
      ShardinitError: as ``plan_options`` and ``shardinit.plan``.
    """
    from shardinit.core.plan.planning import make_plan
    from shardinit.core.prng.root_key import as_key

    with progress("plan", unit=""):
        made = make_plan(fn, as_key(asked.seed), plan_options(mesh, asked))
    made.warn()
    return made
