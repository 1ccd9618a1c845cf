"""Findings about how leaves are drawn: keys, dtypes, and what each device computes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax.numpy as jnp

from shardinit.core.cut.cut import Cut
from shardinit.core.cut.leaf_program import LeafProgram, Program
from shardinit.core.ir.graph import topological
from shardinit.core.plan.findings import Finding, finding
from shardinit.core.plan.leaves import PlanLeaf
from shardinit.core.plan.mesh import one_computes
from shardinit.core.prng import derivation as keys
from shardinit.core.window.reasons import ReplicatedReason

_NARROW = ("bfloat16", "float16")


@dataclass(frozen=True)
class HostLeaves:
    """Paths of the leaves that the host's state reaches.

    Attributes:
      random: NumPy's or Python's random state.
      by_process: the process's number.
    """

    random: tuple[str, ...] = ()
    by_process: tuple[str, ...] = ()


def drawing(
    cut: Cut, leaves: Sequence[PlanLeaf], host: HostLeaves
) -> Iterator[Finding]:
    """What is to say of how leaves are drawn.

    Args:
      cut: the function.
      leaves: of the plan; those that are not selected are passed over.
      host: which of them the host's state reaches.
    """
    yield from _in_full(cut, leaves)
    yield from _rbg(cut, leaves)
    yield from _same_key(cut, leaves)
    yield from _unused_key(cut, leaves)
    yield from _narrow(cut, leaves)
    if host.by_process:
        yield finding(
            "by-process",
            host.by_process,
            "they depend on jax.process_index: each process of a job makes others, and "
            "the first dispatch refuses them",
            "Derive what differs along a mesh axis from the key: "
            "jax.random.split(key, n)",
        )
    if host.random:
        yield finding(
            "host-random",
            host.random,
            "NumPy's or Python's random state makes them: no key gives them again, and "
            "every process has others",
            "Draw with jax.random from the function's key",
        )


def _in_full(cut: Cut, leaves: Sequence[PlanLeaf]) -> Iterator[Finding]:
    groups: dict[tuple[bool, ReplicatedReason], list[str]] = {}
    for source, leaf in zip(cut.leaves, leaves, strict=True):
        reason = cut.replicated_reason(source)
        if reason is not None and leaf.selected:
            one = leaf.sharding is not None and one_computes(leaf.sharding.mesh)
            groups.setdefault((one, reason), []).append(leaf.path)
    for (one, reason), paths in groups.items():
        who = "one device of a process" if one else "every device"
        yield finding(
            "computed-in-full",
            paths,
            f"{who} computes all of each ({reason})",
            "Use an initialiser that can be windowed, such as those of "
            "shardinit.initializers, or bound it: memory_limit=<bytes>",
        )


def _rbg(cut: Cut, leaves: Sequence[PlanLeaf]) -> Iterator[Finding]:
    paths = [x.path for x in leaves if x.selected and not x.is_hosted]
    if cut.impl != keys.THREEFRY and paths:
        yield finding(
            "rbg",
            paths,
            f"{cut.impl} keys: a number depends on the size of the whole array, so "
            "every device computes each leaf in full",
            'shardinit.plan(..., prng="threefry"), or jax.random.key(seed, '
            'impl="threefry2x32")',
        )


def _same_key(cut: Cut, leaves: Sequence[PlanLeaf]) -> Iterator[Finding]:
    for group in cut.repeats:
        found = [leaves[number] for number in group if leaves[number].selected]
        if len(found) > 1:
            yield finding(
                "same-key",
                [leaf.path for leaf in found],
                "they have one and the same value: one key drew each of them",
                f"one, two, ... = jax.random.split(key, {len(found)})",
            )


def _unused_key(cut: Cut, leaves: Sequence[PlanLeaf]) -> Iterator[Finding]:
    read = keys.streams_read([d for leaf in cut.leaves for d in leaf.operands])
    for number, name in enumerate(cut.streams or ("",)):
        if not cut.leaves or number in read:
            continue
        which = f"the key of the stream {name!r}" if name else "the root key"
        yield finding(
            "unused-key",
            [leaf.path for leaf in leaves if leaf.selected],
            f"{which} reaches no leaf: every seed gives the same values",
            "Draw from the key that the function is given"
            if not name
            else "Leave it out, or draw from it",
        )


def _narrow(cut: Cut, leaves: Sequence[PlanLeaf]) -> Iterator[Finding]:
    known: dict[int, str] = {}
    groups: dict[str, list[str]] = {}
    for number, leaf in enumerate(leaves):
        if not leaf.selected or leaf.is_hosted:
            continue
        program = cut.run_of(number).program
        if program not in known:
            known[program] = _drawn_narrow(cut.programs[program])
        if known[program]:
            groups.setdefault(known[program], []).append(leaf.path)
    for dtype, paths in groups.items():
        # JAX fills the mantissa and leaves the other bits unused (0.10.2 and 0.12):
        # https://github.com/jax-ml/jax/pull/26974
        bits = jnp.finfo(dtype).nmant + 1
        yield finding(
            "narrow-draw",
            paths,
            f"drawn in {dtype}: a uniform number has no more than {bits} bits, and the "
            "tails of a normal one end early",
            'shardinit.plan(..., draw_dtype="float32"), or draw so: '
            f"init(key, shape, jnp.float32).astype({dtype!r})",
        )


def _drawn_narrow(program: Program) -> str:
    """The narrow float whose bits are drawn; empty if none are."""
    if not isinstance(program, LeafProgram):  # of a file: its graph is not there
        return ""
    made = topological(program.graph.outs)
    # `jax.random` draws a float16 from 16 bits and a bfloat16 from 8, as
    # `jax.random.bits` does integers: only the bitcast tells that a float came of them.
    if not any(n.name == "random_bits" and n.params["bit_width"] < 32 for n in made):
        return ""
    floats = [str(n.outputs[0].dtype) for n in made if n.name == "bitcast_convert_type"]
    return next((dtype for dtype in floats if dtype in _NARROW), "")
