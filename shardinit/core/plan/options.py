"""What a plan may be told: one value that every call passes on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from shardinit.core.plan.mesh import AnyMesh, check_mesh
from shardinit.core.plan.rules import Rules
from shardinit.errors import ShardingError

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
      strict: refuse leaves that every device must compute whole.
      whole: how such leaves are computed, ``"replicate"`` or ``"gspmd"``.
      memory_limit: bytes that the leaves of one whole program may take together.

    Raises:
      ShardingError: what is no mesh, or both rules and shardings.
      ValueError: another ``whole``.
    """

    mesh: AnyMesh | None = None
    rules: Rules | None = None
    out_shardings: Any = None
    select: Select | None = None
    strict: bool = False
    whole: str = "replicate"
    memory_limit: int | None = None

    def __post_init__(self) -> None:
        if self.whole not in ("replicate", "gspmd"):
            raise ValueError(f"whole={self.whole!r}; expected 'replicate' or 'gspmd'")
        check_mesh(self.mesh)
        if self.rules is not None and self.out_shardings is not None:
            raise ShardingError("rules and out_shardings", "both were given", "one")
