"""The bytes that a device holds, checked against a limit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from shardinit.core.cut.cut import Cut
from shardinit.core.plan.leaves import PlanLeaf, gather_results
from shardinit.errors import WholeLeafError


def check_memory(cut: Cut, leaves: Sequence[PlanLeaf], limit: int) -> None:
    """Refuses a plan under which a device holds more than ``limit`` bytes.

    Every leaf counts with its shard, whatever the reason for its size. A leaf that is
    computed in full is there in full while its program runs, and so is the shard of one
    that lies in its host's memory: it is made in the device's and then copied.

    Raises:
      WholeLeafError: with the leaves that take most.
    """
    kept = [leaf for leaf in leaves if leaf.selected and not leaf.memory_kind]
    shards = sum(leaf.bytes_per_device for leaf in kept)
    runs = list(_runs(cut, leaves))
    group = max(runs, key=lambda run: (_beside(run), run[0].is_replicated), default=[])
    most = _beside(group)
    if shards + most <= limit:
        return
    heaviest = sorted(kept, key=lambda leaf: -leaf.bytes_per_device)[:3]
    named = ", ".join(f"{x.path!r} {x.bytes_per_device:,}" for x in heaviest)
    if most or group[0].is_replicated:
        named = "; ".join(filter(None, (named, _while_running(group))))
    raise WholeLeafError(
        f"leaf {(heaviest or group)[0].path!r}",
        f"a device holds {shards + most:,} bytes, most of them of {named}",
        f"at most memory_limit={limit:,} bytes",
        "Shard these leaves over more devices, or raise memory_limit",
    )


def _runs(cut: Cut, leaves: Sequence[PlanLeaf]) -> Iterator[list[PlanLeaf]]:
    """The leaves of each run of a program."""
    for numbers in gather_results(cut):
        group = [leaves[i] for i in numbers]
        if any(leaf.selected for leaf in group):
            yield group


def _beside(group: Sequence[PlanLeaf]) -> int:
    """Bytes that a run takes beside the shards that stay."""
    stay = (leaf for leaf in group if leaf.selected and not leaf.memory_kind)
    return sum(map(_made, group)) - sum(leaf.bytes_per_device for leaf in stay)


def _made(leaf: PlanLeaf) -> int:
    """Bytes of a leaf that a run makes on a device."""
    if leaf.is_replicated:
        return leaf.nbytes
    return leaf.bytes_per_device


def _while_running(group: Sequence[PlanLeaf]) -> str:
    """Why a run takes more than what stays of it."""
    leaf, size = group[0], f"{sum(map(_made, group)):,} bytes"
    if leaf.is_replicated:
        return f"{leaf.path!r} must be computed in full ({leaf.whole}): {size}"
    return f"{leaf.path!r} is made here before it lies in {leaf.memory_kind}: {size}"
