"""The steps of an initialisation, in the documented order.

Each `Initializer` is replaced by its value. Then ``rng_init`` runs for each module that
is not initialised, children before parents. Then the forward call assigns the values
that depend on the shape of its input. The steps change the given modules in place.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import jax

from shardinit.core.ir.jaxpr import is_tracer
from shardinit.core.paths import path_str
from shardinit.errors import ModuleFieldError
from shardinit.module import context, walk
from shardinit.module.fields import Initializer, Inputs, LeftOut
from shardinit.module.walk import PRIVATE, ModuleNode, Path


def initialise(root: Any, prefix: Path = ()) -> None:
    """Runs the two steps that need no input, in place, in the current scope.

    Args:
      root: a module.
      prefix: the path of ``root``; not empty if a compact method constructed it.
    """
    if not prefix:
        _make_left_out(root)

    def fill(path: Path, owner: ModuleNode, name: str, leaf: Any) -> Any:
        if not isinstance(leaf, Initializer):
            return leaf
        where = path_str((*prefix, *path))
        with context.entered(
            replace(context.current_scope(), path=where, module=owner)
        ):
            try:
                return leaf(context.next_key())
            except Exception as error:
                context.note(error, f"in the Initializer {where!r}, being initialised")
                raise

    walk.map_leaves(root, fill)
    for _, module in walk.modules(root):
        # Once: a module that still waits for inputs keeps what the first `init` drew.
        if not module._initialized and not module._rng_ran:
            with context.calling(module):
                module.rng_init()  # type: ignore[attr-defined]
            module.__dict__["_rng_ran"] = True


def _make_left_out(root: Any) -> None:
    """Makes what an earlier initialisation left out; its modules are then complete."""
    made: dict[Any, list[Any]] = {}
    completed: dict[int, ModuleNode] = {}

    def fill(path: Path, owner: ModuleNode, name: str, leaf: Any) -> Any:
        if not isinstance(leaf, LeftOut):
            return leaf
        if leaf.fn not in made:
            made[leaf.fn] = jax.tree.leaves(leaf.fn(context.current_scope().root_key))
        completed[id(owner)] = owner
        return made[leaf.fn][leaf.number]

    walk.map_leaves(root, fill)
    for module in completed.values():
        module.__dict__["_initialized"] = True


def mark_waiting(root: Any) -> None:
    """Marks modules uninitialised of which ``select`` left something out."""

    def mark(path: Path, owner: ModuleNode, name: str, leaf: Any) -> Any:
        if isinstance(leaf, LeftOut):
            owner.__dict__["_initialized"] = False
        return leaf

    walk.map_leaves(root, mark)


def forward(
    root: Any, call_method: str, inputs: Inputs, others: Iterable[Any] = ()
) -> None:
    """Runs the forward call; modules that were initialised before keep their values.

    Args:
      root: the outermost module.
      call_method: the method that is called with ``inputs``.
      inputs: the arguments of the call.
      others: modules that the call may reach through static fields.
    """
    method = getattr(root, call_method, None)
    if not callable(method):
        raise ModuleFieldError(
            f"module {type(root).__name__}",
            f"it has no method {call_method!r} to initialise it with",
            "a method that takes the inputs",
            "Name it: m.init(key, inputs, call_method=...), or give no inputs",
        )
    held = [
        (module, {k: v for k, v in vars(module).items() if k not in PRIVATE})
        for module in [*(module for _, module in walk.modules(root)), *others]
        if module._initialized
    ]
    with context.calling(root):
        method(*inputs.args, **inputs.kwargs)
    # The call assigns to them as well, as a `Dropout` does that splits its key.
    for module, fields in held:
        module.__dict__.update(fields)


def complete(module: Any) -> bool:
    """Whether no own field is empty and all compact methods have run."""
    if any(walk.lacks(getattr(module, name)) for name in walk.node_names(module)):
        return False
    return all(name in (module._subtrees or {}) for name in module._compact_methods)


def refuse_static_tracers(root: ModuleNode) -> None:
    """Raises if a traced array was assigned to a field outside the pytree.

    Raises:
      ModuleFieldError: there is such an array; it names the path.
    """
    for path, module in walk.modules(root):
        for name, value in walk.static_fields(module).items():
            if any(map(is_tracer, jax.tree.leaves(value))):
                where = path_str((*path, jax.tree_util.GetAttrKey(name)))
                raise ModuleFieldError(
                    f"field {where!r} of {type(module).__name__}",
                    "init assigned an array to it, and it is no node of the pytree",
                    f"a declared kind, such as `{name}: jax.Array | None = "
                    "Parameter.node()`",
                    "Declare the field in the class; modules in static fields cannot "
                    "be initialised from outside",
                )
