"""Init: a plan, its executables and one call of them, in one."""

from __future__ import annotations

from collections.abc import Collection

from shardinit.core.plan.mesh import AnyMesh
from shardinit.core.plan.options import PlanOptions, Select
from shardinit.core.plan.placement import Placement
from shardinit.core.plan.planning import make_plan
from shardinit.core.plan.rules import Rules
from shardinit.core.prng.root_key import KeyLike, as_key
from shardinit.core.run.compile import compile_plan
from shardinit.core.types import DType, Tree
from shardinit.progress import Report


def init(
    fn: object,
    key: KeyLike,
    *,
    mesh: AnyMesh | None = None,
    rules: Rules | None = None,
    out_shardings: Tree = None,
    select: Select | None = None,
    strict: bool | Collection[str] = False,
    whole: str = "replicate",
    indivisible: str = "error",
    memory_limit: int | None = None,
    prng: str | None = None,
    draw_dtype: DType = None,
    opt_rules: Rules | Placement | None = None,
    opt_state: Select | None = None,
    progress: Report | None = None,
) -> Tree:
    """Initialises ``fn`` on a mesh, every device making its own shard.

    ``plan``, ``compile_plan`` and the call in one; see there for the arguments and
    the errors.

    Args:
      fn: ``key -> pytree of arrays``, an ``InitFn`` or an ``InitProgram``.
      key: a key or an int seed; or, by the names of its streams, several of them.
      mesh: the devices; default the first one.
      rules: as for ``plan``.
      out_shardings: as for ``plan``.
      select: as for ``plan``.
      strict: as for ``plan``.
      whole: as for ``plan``.
      indivisible: as for ``plan``.
      memory_limit: as for ``plan``.
      prng: as for ``plan``.
      draw_dtype: as for ``plan``.
      opt_rules: as for ``plan``.
      opt_state: as for ``plan``.
      progress: called with (leaves dispatched, leaves in all).

    Returns:
      What ``fn(key)`` returns, sharded; its values equal ``jax.jit(fn)(key)``.

    Example:
      >>> import jax, shardinit
      >>> init = lambda key: {"w": jax.random.normal(key, (64, 32))}
      >>> params = shardinit.init(init, 42)
      >>> bool((params["w"] == jax.jit(init)(jax.random.key(42))["w"]).all())
      True
    """
    options = PlanOptions(
        mesh=mesh,
        rules=rules,
        out_shardings=out_shardings,
        select=select,
        strict=strict,
        whole=whole,
        indivisible=indivisible,
        memory_limit=memory_limit,
        prng=prng,
        draw_dtype=draw_dtype,
        opt_rules=opt_rules,
        opt_state=opt_state,
    )
    return initialised(fn, key, options, progress)


def initialised(
    fn: object, key: KeyLike, options: PlanOptions, progress: Report | None
) -> Tree:
    """``init`` for options that are one object."""
    root = as_key(key)
    made = make_plan(fn, root, options)
    made.warn()
    compiled = compile_plan(made)
    return compiled.rebuild(compiled.run(root, progress))
