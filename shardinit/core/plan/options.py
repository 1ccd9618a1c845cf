"""The options of a plan, in one object that every call passes on."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

import jax
import numpy as np

from shardinit.core.plan.findings import KINDS
from shardinit.core.plan.mesh import AnyMesh, check_mesh
from shardinit.core.plan.placement import Placement
from shardinit.core.plan.rules import Rules
from shardinit.core.types import DType, Tree
from shardinit.errors import ArgumentError, ShardingError
from shardinit.short import short_repr

Select = str | Iterable[str] | Callable[[str], bool]


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """The arguments of ``shardinit.plan`` beside the function and the key.

    Attributes:
      mesh: a ``Mesh`` or ``AbstractMesh``; None plans without shardings.
      rules: ``AxisRules``, ``PathRules`` or ``fsdp(...)``; default: axis names that
        are mesh axes, else ``fsdp()`` over all axes.
      out_shardings: a pytree prefix of shardings instead of rules.
      select: globs over leaf paths, or a predicate: the leaves to initialise.
      strict: refuse what the findings warn of, or a set of the kinds to refuse.
      whole: how such leaves are computed, ``"replicate"`` or ``"gspmd"``.
      indivisible: what happens where an axis does not divide by the mesh axes of its
        rule: ``"error"``, or ``"next"`` for the next rule, else whole.
      memory_limit: bytes that a device may hold.
      prng: ``"threefry"`` derives all keys from a threefry one, whatever the root key.
      draw_dtype: narrower floats are drawn in this dtype and rounded.
      opt_rules: rules for optimizer state alone, or a ``Placement`` of such rules.
      opt_state: globs or a predicate on paths: leaves that are optimizer state.

    Raises:
      ShardingError: what is no mesh, or both rules and shardings.
      ValueError: another ``whole``.
    """

    __repr__ = short_repr

    mesh: AnyMesh | None = None
    rules: Rules | None = None
    out_shardings: Tree = None
    select: Select | None = None
    strict: bool | Collection[str] = False
    whole: str = "replicate"
    indivisible: str = "error"
    memory_limit: int | None = None
    prng: str | None = None
    draw_dtype: DType = None
    opt_rules: Rules | Placement | None = None
    opt_state: Select | None = None

    def __post_init__(self) -> None:
        if self.whole not in ("replicate", "gspmd"):
            raise ArgumentError("whole", repr(self.whole), "'replicate' or 'gspmd'")
        if self.indivisible not in ("error", "next"):
            raise ArgumentError(
                "indivisible", repr(self.indivisible), "'error' or 'next'"
            )
        if self.prng not in (None, "threefry"):
            raise ArgumentError("prng", repr(self.prng), "None or 'threefry'")
        if self.draw_dtype is not None:
            _check_draw_dtype(self.draw_dtype)
        _check_strict(self.strict)
        if self.memory_limit is not None:
            ArgumentError.check_bytes("memory_limit", self.memory_limit)
        check_mesh(self.mesh)
        for name in ("rules", "opt_rules") if self.out_shardings is not None else ():
            if getattr(self, name) is not None:
                raise ShardingError(
                    f"{name} and out_shardings", "both were given", "one"
                )

    def differing(self, names: Iterable[str]) -> list[str]:
        """Those of the fields that are not as by default."""
        default = PlanOptions()
        return [x for x in names if getattr(self, x) != getattr(default, x)]


def _check_draw_dtype(dtype: DType) -> None:
    try:
        # Without `jax_enable_x64` JAX makes float32 of float64 in silence: draws would
        # be narrower than was asked for.
        kept = jax.dtypes.canonicalize_dtype(dtype)
    except TypeError:
        kept = None
    wide = kept is not None and np.issubdtype(kept, np.floating) and kept.itemsize > 2
    if not wide or kept != np.dtype(dtype):
        raise ArgumentError(
            "draw_dtype",
            repr(dtype),
            "float32, float64 (with jax_enable_x64) or None",
        )


def _check_strict(strict: bool | Collection[str]) -> None:
    if isinstance(strict, bool):
        return
    given = isinstance(strict, Collection) and not isinstance(strict, str)
    if not given or not set(strict) <= set(KINDS):
        kinds = f"True, False or a set of kinds of findings: {', '.join(KINDS)}"
        raise ArgumentError("strict", repr(strict), kinds)
