"""What a cut function is: its leaves, and the few distinct programs that make them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jax.sharding import NamedSharding

from shardinit.core.cut.leaf_program import (
    LeafProgram,
    Program,
)
from shardinit.core.cut.sources import (
    Constant,
    Replicated,
    Run,
    Source,
    Windowed,
)
from shardinit.core.ir import jaxpr as jx
from shardinit.core.leaf_spec import LeafSpec
from shardinit.core.prng import derivation as keys
from shardinit.core.types import TreeDef
from shardinit.core.window import constants
from shardinit.core.window.reasons import ReplicatedReason
from shardinit.short import short_repr


@dataclass(frozen=True, eq=False)
class LeafCut(LeafSpec):
    """One leaf of the function, and where it comes from.

    Attributes:
      source: where it comes from.
      weak_type: whether its dtype gives way to others, as a Python number's does.
    """

    source: Source
    weak_type: bool = False

    @property
    def operands(self) -> tuple[keys.Derivation, ...]:
        """The keys that it is made of, in the order of its program's operands."""
        return self.source.operands


@dataclass(frozen=True, eq=False)
class Cut:
    """An init function taken apart.

    Attributes:
      leaves: in the order of the pytree.
      programs: the distinct programs.
      tree: the pytree structure of the result.
      impl: the key implementation; typed: whether the root key is a typed one.
      streams: the names of the streams that have a key each; none of a single key.
      stated: the sharding that the function itself gives each leaf, or None.
      repeats: groups of leaves, by number, of one value that one key drew twice.
    """

    __repr__ = short_repr

    leaves: tuple[LeafCut, ...]
    programs: tuple[Program, ...]
    tree: TreeDef
    impl: str
    typed: bool
    streams: tuple[str, ...] = ()
    stated: tuple[NamedSharding | None, ...] = ()
    repeats: tuple[tuple[int, ...], ...] = ()

    def run_of(self, number: int) -> Run:
        """The source of a leaf that a program computes."""
        source = self.leaves[number].source
        assert isinstance(source, Run)
        return source

    def replicated_reason(self, leaf: LeafCut) -> ReplicatedReason | None:
        """Why every device computes all of a leaf; None if none does."""
        if not isinstance(leaf.source, Replicated):
            return None
        return leaf.source.program_of(self.programs).replicated_reason

    def replicated_text(self, leaf: LeafCut) -> str:
        """Why every device computes all of a leaf, for people; empty if none does."""
        return str(self.replicated_reason(leaf) or "")

    def is_uniform(self, leaf: LeafCut) -> bool:
        """Whether all elements of a leaf are known to be one number."""
        if not isinstance(leaf.source, Windowed):
            return False
        program = leaf.source.program_of(self.programs)
        return isinstance(program, LeafProgram) and constants.is_uniform(program.graph)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the whole function: its leaves, their programs and their keys.

        Equal in every process that traces the same function with the same JAX
        settings; independent of the mesh and of the key's value.
        """
        return _fingerprint(self)


def _fingerprint(cuts: Cut) -> str:
    sha = hashlib.sha256()
    numbers: dict[int, int] = {}
    leaves = sorted(cuts.leaves, key=lambda leaf: leaf.path)
    for node in keys.topological(d for leaf in leaves for d in leaf.operands):
        numbers[id(node)] = len(numbers)
        parents = [numbers[id(p)] for p in node.parents]
        sha.update(repr((node.op, node.impl, node.words, parents, node.shape)).encode())
        sha.update(node.data.tobytes())
    for leaf in leaves:
        source = leaf.source
        program = source.program_of(cuts.programs)
        digest = "" if program is None else program.digest
        derived = [numbers[id(d)] for d in leaf.operands]
        facts = (leaf.path, leaf.shape, str(leaf.dtype), digest, source.result, derived)
        sha.update(repr(facts).encode())
        if isinstance(source, Constant):
            sha.update(np.ascontiguousarray(source.array).tobytes())
    sha.update(repr((cuts.impl, cuts.typed, jx.setting("jax_enable_x64"))).encode())
    if cuts.streams:
        sha.update(repr(cuts.streams).encode())
    return sha.hexdigest()
