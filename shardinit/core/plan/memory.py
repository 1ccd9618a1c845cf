"""What a device holds, held against a limit."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from shardinit.core.cut.cut import Cut
from shardinit.core.plan.leaves import PlanLeaf, gather_results, itemsize
from shardinit.errors import WholeLeafError


def check_memory(cut: Cut, leaves: Sequence[PlanLeaf], limit: int) -> None:
    """Refuses a plan under which a device holds more than ``limit`` bytes.

    Every leaf counts with its shard, whatever the reason for its size. A leaf that is
    computed in full is there in full while its program runs.

    Raises:
      WholeLeafError: with the leaves that take most.
    """
    chosen = [leaf for leaf in leaves if leaf.selected]
    shards = sum(leaf.bytes_per_device for leaf in chosen)
    group = max(_in_full(cut, leaves), key=_beside, default=[])
    most = _beside(group)
    if shards + most <= limit:
        return
    heaviest = sorted(chosen, key=lambda leaf: -leaf.bytes_per_device)[:3]
    named = ", ".join(f"{x.path!r} {x.bytes_per_device:,}" for x in heaviest)
    if group:
        named += (
            f"; {group[0].path!r} must be computed in full ({group[0].whole}): "
            f"{sum(map(_nbytes, group)):,} bytes"
        )
    raise WholeLeafError(
        f"leaf {heaviest[0].path!r}",
        f"a device holds {shards + most:,} bytes, most of them of {named}",
        f"at most memory_limit={limit:,} bytes",
        "Shard these leaves over more devices, or raise memory_limit",
    )


def _in_full(cut: Cut, leaves: Sequence[PlanLeaf]) -> Iterator[list[PlanLeaf]]:
    """Leaves that every device computes in full, those of one run together."""
    for numbers in gather_results(cut):
        group = [leaves[i] for i in numbers]
        if group[0].is_replicated and any(leaf.selected for leaf in group):
            yield group


def _beside(group: Sequence[PlanLeaf]) -> int:
    """Bytes that a run of whole leaves takes beside the shards that stay."""
    kept = sum(leaf.bytes_per_device for leaf in group if leaf.selected)
    return sum(map(_nbytes, group)) - kept


def _nbytes(leaf: PlanLeaf) -> int:
    return math.prod(leaf.shape) * itemsize(leaf.dtype)
