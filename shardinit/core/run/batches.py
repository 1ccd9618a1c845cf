"""Which leaves one call of an executable makes: a draw alone, constants many at once.

Zeros cost less than the call that fills them (0.2 ms for eight devices), and far less
than a program to compile (0.1 s), and a training state is two thirds zeros: Adam's
moments. So leaves that are filled with one number are made up to 64 a call, of whatever
shapes they are. Draws are not: sixteen of one shape in a program compile five times as
long as one. Nor is what lies in a host's memory: each shard is made in the device's and
then copied, and the TPU's compiler keeps five or six of sixteen shards there at a time
(`temp_size_in_bytes` of a compile for v5e, JAX 0.12.0.1), which is memory that whoever
puts moments on the host hasn't got.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from shardinit.core.cut.cut import Cut
from shardinit.core.plan.entries import other_memory
from shardinit.core.plan.leaves import PlanProgram, gather_results
from shardinit.core.plan.plan import Plan
from shardinit.core.prng.derivation import Derivation

# With more results XLA's time to compile grows faster than their number: 64 in 0.4 s,
# 1,024 in 4.4 s (broadcasts under shard_map on 8 CPU devices, JAX 0.10.2). So it does
# for whatever is written out again and again: https://github.com/jax-ml/jax/issues/2777
_WIDEST = 64


Group = tuple[int, ...]  # leaves that one run of one program makes


@dataclass(frozen=True)
class Call:
    """One run of an executable.

    Attributes:
      groups: for each of its programs the leaves that are its results.
    """

    groups: tuple[Group, ...]

    @property
    def leaves(self) -> list[int]:
        """The leaves that it makes, in the order of the results."""
        return [leaf for group in self.groups for leaf in group]

    def operands(self, cut: Cut) -> tuple[Derivation, ...]:
        """The operands of its programs, one after the other."""
        firsts = [cut.leaves[group[0]] for group in self.groups]
        return tuple(operand for leaf in firsts for operand in leaf.operands)


@dataclass(frozen=True)
class Batch:
    """An executable and its calls.

    Attributes:
      programs: what one call computes, side by side; numbers in ``plan.programs``.
      calls: all runs of it.
    """

    programs: tuple[int, ...]
    calls: tuple[Call, ...]


def batches(plan: Plan) -> list[Batch]:
    """What is compiled for a plan, and the calls that make its selected leaves."""
    made: dict[int, list[Group]] = {}
    for group in gather_results(plan.cut):
        if any(plan.leaves[i].selected for i in group):
            made.setdefault(plan.leaves[group[0]].program, []).append(tuple(group))
    fills: dict[object, dict[int, list[Group]]] = {}
    found = []
    for number, groups in made.items():
        program = plan.programs[number]
        if program.program.fills and not other_memory(program.shardings[0]):
            fills.setdefault(_place(program), {})[number] = groups
        else:
            found.append(Batch((number,), tuple(Call((group,)) for group in groups)))
    return found + [batch for kinds in fills.values() for batch in _together(kinds)]


def _place(program: PlanProgram) -> object:
    """What programs of one executable share."""
    sharding = program.shardings[0]
    return None if sharding is None else sharding.mesh


def _together(kinds: Mapping[int, Sequence[Group]]) -> Iterator[Batch]:
    """Batches of what several programs make.

    All calls of a batch are alike, so that it is one executable; what that leaves over
    goes to the next batch.
    """
    waiting = {number: list(groups) for number, groups in kinds.items()}
    while waiting:
        counts = {number: len(groups) for number, groups in waiting.items()}
        calls = min(-(-sum(counts.values()) // _WIDEST), max(counts.values()))
        programs = [n for n, count in counts.items() for _ in range(count // calls)]
        programs = programs[:_WIDEST]
        taken = [Call(tuple(waiting[n].pop() for n in programs)) for _ in range(calls)]
        yield Batch(tuple(programs), tuple(taken))
        waiting = {number: groups for number, groups in waiting.items() if groups}
