"""Findings about where leaves lie: what rules do not reach."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from jax.sharding import AxisType

from shardinit.core.plan.entries import parts
from shardinit.core.plan.findings import WARN_BYTES, Finding, finding
from shardinit.core.plan.fsdp import Fsdp
from shardinit.core.plan.leaf_info import LARGE, Cause, Placed
from shardinit.core.plan.mesh import AnyMesh
from shardinit.core.plan.overruled import overruled
from shardinit.core.plan.rules import AxisRules, PathRules, Rules
from shardinit.core.plan.unmatched import unmatched_names, unmatched_paths


def placing(
    placed: Sequence[Placed], mesh: AnyMesh, rules: Rules | None, given: bool
) -> Iterator[Finding]:
    """What is to say of where leaves lie.

    Args:
      placed: the leaves.
      mesh: the mesh.
      rules: the rules that placed them; None for the default.
      given: the caller said where each leaf lies (``out_shardings``).
    """
    made = [x for x in placed if x.selected]
    yield from _explicit_mesh(mesh)
    yield from _short_names(made)
    yield from overruled(made, mesh)
    if given or mesh.size == 1:
        return
    nameless = all(x.leaf.axes is None for x in placed)
    if isinstance(rules, AxisRules) and made and nameless:
        yield _unnamed(made, rules)
    else:
        yield from _replicated(made)
    yield from _nothing_sharded(made, mesh, rules)
    if isinstance(rules, AxisRules):
        yield from unmatched_names(placed, mesh, rules)
    if isinstance(rules, PathRules):
        yield from unmatched_paths(placed, rules)


def unplaced(devices: int, leaf_count: int) -> Iterator[Finding]:
    """What is to say of a plan that has no mesh.

    Args:
      devices: how many there are.
      leaf_count: how many leaves it has.
    """
    if devices > 1 and leaf_count:
        yield finding(
            "no-mesh",
            (),
            f"there are {devices} devices and the plan has no mesh: one device makes "
            "all of it",
            f'mesh=jax.make_mesh(({devices},), ("data",), '
            "axis_types=(jax.sharding.AxisType.Auto,))",
        )


def _nothing_sharded(
    placed: Sequence[Placed], mesh: AnyMesh, rules: Rules | None
) -> Iterator[Finding]:
    """What no other finding names: leaves left whole without a rule that wants that.

    Where a rule was chosen that keeps a leaf whole, it is meant so (plain data
    parallelism); where an axis could not be cut, `_replicated` has said so.
    """
    left = [x for x in placed if not x.choice.reasons and not _meant_so(x)]
    if not left or any(_is_divided(x, mesh) for x in placed):
        return
    size = sum(x.leaf.nbytes for x in left)
    axes = ", ".join(map(repr, mesh.axis_names))
    yield finding(
        "nothing-sharded",
        [x.leaf.path for x in left],
        f"no leaf is sharded: each of {mesh.size} devices holds them all, "
        f"{size:,} bytes, since {_why_nothing(left, rules)}",
        f"rules=shardinit.fsdp({axes}, min_bytes=0)",
        severity=None if size >= WARN_BYTES else "note",
    )


def _meant_so(x: Placed) -> bool:
    """Whether a rule, or the function itself, says that every device holds it all."""
    asked = bool(x.choice.rules) or x.leaf.stated is not None
    return x.is_replicated and asked


def _is_divided(x: Placed, mesh: AnyMesh) -> bool:
    return any(parts(entry, mesh.shape) != 1 for entry in x.sharding.spec)


def _why_nothing(left: Sequence[Placed], rules: Rules | None) -> str:
    if not all(x.is_replicated for x in left):
        return "the mesh axes that were chosen for them have size 1"
    if isinstance(rules, Fsdp):
        return f"each is smaller than min_bytes={rules.min_bytes:,}"
    return f"no rules were given, and fsdp() leaves what is under {LARGE:,} bytes"


def _explicit_mesh(mesh: AnyMesh) -> Iterator[Finding]:
    if AxisType.Explicit not in mesh.axis_types:
        return
    sizes, names = tuple(mesh.shape.values()), tuple(mesh.axis_names)
    yield finding(
        "explicit-mesh",
        (),
        "the mesh has Explicit axes, as jax.make_mesh gives them: a forward pass may "
        "fail on arrays whose type says how they are sharded",
        f"mesh = jax.make_mesh({sizes}, {names}, "
        f"axis_types=(jax.sharding.AxisType.Auto,) * {len(names)})",
    )


def _short_names(placed: Sequence[Placed]) -> Iterator[Finding]:
    groups: dict[tuple[int, int], list[str]] = {}
    for x in placed:
        rank, named = len(x.leaf.shape), x.leaf.named
        if named is not None and 0 < named < rank:
            groups.setdefault((named, rank), []).append(x.leaf.path)
    for (named, rank), paths in groups.items():
        yield finding(
            "short-names",
            paths,
            f"names for {named} of {rank} axes; as in Flax they name the first ones",
            "Name the others as well; the one that a transformation adds, by "
            'nn.scan(..., metadata_params={nn.PARTITION_NAME: "layers"}) or '
            'nnx.vmap(..., transform_metadata={nnx.PARTITION_NAME: "layers"})',
        )


def _unnamed(placed: Sequence[Placed], rules: AxisRules) -> Finding:
    axes = ("embed", "mlp")
    return finding(
        "unnamed",
        [x.leaf.path for x in placed],
        "no leaf has axis names, so axis rules place none of them: all lie whole",
        "rules=shardinit.fsdp(), or names: "
        f"shardinit.InitFn(fn, axes={{{placed[0].leaf.path!r}: {axes}}})",
        rules=rules.rules[:1],
    )


def _replicated(placed: Sequence[Placed]) -> Iterator[Finding]:
    """What no rule reaches, but for a hundredth of the model: biases and scales."""
    worth_saying = sum(x.leaf.nbytes for x in placed) / 100
    for (cause, is_replicated, large), found in _by_cause(placed).items():
        leaves, (remedy, *_) = zip(*found, strict=True)
        if not large and sum(x.leaf.nbytes for x in leaves) < worth_saying:
            continue
        where = "whole on every device" if is_replicated else "not cut there"
        yield finding(
            "replicated",
            [x.leaf.path for x in leaves],
            f"{cause}: {where}",
            remedy,
            rules=dict.fromkeys(rule for x in leaves for rule in x.choice.rules),
            severity="warning" if large else "note",
        )


def _by_cause(
    placed: Sequence[Placed],
) -> dict[tuple[Cause, bool, bool], list[tuple[Placed, str]]]:
    """Leaves with their remedies by cause, replicated or not, and large or not."""
    groups: dict[tuple[Cause, bool, bool], list[tuple[Placed, str]]] = {}
    for x in placed:
        large = x.is_replicated and x.leaf.nbytes >= LARGE
        for reason in x.choice.reasons:
            kind = (reason.cause, x.is_replicated, large)
            groups.setdefault(kind, []).append((x, reason.remedy))
    return groups
