"""What a device holds, held against a limit."""

from __future__ import annotations

import math
from collections.abc import Sequence

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
    shards = sum(leaf.bytes_per_device for leaf in leaves if leaf.selected)
    most, running = 0, ""
    for group in gather_results(cut):
        made = [leaves[i] for i in group]
        if not made[0].whole or not any(leaf.selected for leaf in made):
            continue
        full = sum(math.prod(x.shape) * itemsize(x.dtype) for x in made)
        beside = full - sum(x.bytes_per_device for x in made if x.selected)
        if not running or beside > most:
            most = beside
            running = (
                f"; {made[0].path!r} must be computed in full "
                f"({made[0].whole}): {full:,} bytes"
            )
    if shards + most <= limit:
        return
    chosen = [leaf for leaf in leaves if leaf.selected]
    heaviest = sorted(chosen, key=lambda leaf: -leaf.bytes_per_device)[:3]
    named = ", ".join(f"{x.path!r} {x.bytes_per_device:,}" for x in heaviest)
    raise WholeLeafError(
        f"leaf {heaviest[0].path!r}",
        f"a device holds {shards + most:,} bytes, most of them of {named}{running}",
        f"at most memory_limit={limit:,} bytes",
        "Shard these leaves over more devices, or raise memory_limit",
    )
