"""Equinox: a model is a pytree, and its constructor a function of a key.

What the constructor returns holds more than arrays: activation functions, flags and
sizes, some of them leaves and some static fields. The arrays are what a key draws; all
the rest is the same for every key: it is taken from the trace and put back.

A field that is static is part of the structure. NumPy arrays stay in it as they are; an
array that JAX computes there while the constructor is traced exists only in the trace,
and is refused by the name of its field.

Haliax's named arrays, alone or inside of Equinox modules, name their axes, and so may a
field of a module (``eqx.field(metadata={"axis_names": ...})``, as Haliax reads it): the
names are logical axes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax

from shardinit.core.cut.statics import refuse_static_tracers
from shardinit.core.cut.trace import trace
from shardinit.core.host_state import watched
from shardinit.core.init_fn import InitFn
from shardinit.core.ir.jaxpr import collector_paused
from shardinit.core.paths import path_str
from shardinit.errors import InitFnError
from shardinit.extras import needs
from shardinit.frontends import check_arguments

with needs("equinox", "equinox"):
    import equinox as eqx

_HOLE = object()  # where an array was


def _is_drawn(x: Any) -> bool:
    return eqx.is_array(x) or isinstance(x, jax.ShapeDtypeStruct)


def _state_of(tree: Any) -> Any:
    """A model without what is no array; other trees as they are."""

    def is_module(node: Any) -> bool:
        return isinstance(node, eqx.Module)

    holds_one = any(map(is_module, jax.tree.leaves(tree, is_leaf=is_module)))
    return eqx.filter(tree, _is_drawn) if holds_one else tree


def _trainable(made: Any) -> Any:
    """The inexact arrays, but for the state that ``make_with_state`` gives."""

    def is_state(node: Any) -> bool:
        return isinstance(node, eqx.nn.State)

    arrays = eqx.filter(made, eqx.is_inexact_array)
    return jax.tree.map(lambda x: None if is_state(x) else x, arrays, is_leaf=is_state)


def _axes(tree: Any) -> Any:
    """The names of the axes of each array, shaped like the tree; None without any."""
    # By ``id``: neither arrays nor tracers of JAX have a hash.
    named: dict[int, tuple[str, ...]] = {}
    for node in _nodes(tree):
        if _is_named(node):
            named[id(node.array)] = tuple(axis.name for axis in node.axes)
        for field in dataclasses.fields(node) if isinstance(node, eqx.Module) else ():
            names = field.metadata.get("axis_names")
            if names is not None:
                of = tuple(getattr(name, "name", name) for name in names)
                named[id(getattr(node, field.name))] = of
    leaves, structure = jax.tree.flatten(tree)
    if not named:
        return None
    return structure.unflatten([named.get(id(leaf)) for leaf in leaves])


def _is_named(node: Any) -> bool:
    """Whether a node is a named array of Haliax, which is not imported for it."""
    return hasattr(node, "axes") and hasattr(node, "resolve_axis")


def _nodes(tree: Any) -> Iterator[Any]:
    """All inner nodes of a pytree that are Equinox modules or named arrays."""

    def is_one(node: Any) -> bool:
        return isinstance(node, eqx.Module) or _is_named(node)

    stack = [tree]
    while stack:
        found = jax.tree.leaves(stack.pop(), is_leaf=is_one)
        for node in filter(is_one, found):
            yield node
            if not _is_named(node):
                stack.extend(getattr(node, x.name) for x in dataclasses.fields(node))


def _paths(tree: Any) -> list[str]:
    return [path_str(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def _check(model: Any, name: str, args: tuple, kwargs: dict[str, Any]) -> None:
    """Refuses what makes no model, and arguments that it does not take."""
    where = f"equinox.init_fn({name}, ...)"
    if not callable(model) or "key" in kwargs:
        raise InitFnError(
            where,
            "a key was given" if callable(model) else f"got {name}",
            "a class or a function, with its arguments but for the key",
            f"shardinit.init({where}, key)",
        )
    check_arguments(where, model, args, {**kwargs, "key": None})


def init_fn(model: Callable[..., Any], *args: Any, **kwargs: Any) -> InitFn:
    """Makes an `InitFn` of the constructor of an Equinox model.

    The function's result is what ``model(*args, key=key, **kwargs)`` returns, with None
    for every leaf that is no array; ``rebuild`` puts those leaves back. A layer that
    stands in two places of the model is drawn for each, as by Equinox, unless
    `equinox.nn.Shared` holds it. ``axes`` holds the names of Haliax's named arrays.

    Building the `InitFn` traces the constructor once and allocates nothing.

    Args:
      model: an `equinox.Module` class or any function that takes ``key`` and returns a
        pytree: one that makes an ensemble by `equinox.filter_vmap`, or
        ``equinox.nn.make_with_state(Model)``.
      *args: positional arguments of the constructor.
      **kwargs: keyword arguments of the constructor.

    Returns:
      An `InitFn`. Its values are those of
      ``equinox.filter_jit(model)(*args, key=key, **kwargs)``, bit for bit.

    Raises:
      InitFnError: an array in a static field was computed by the constructor, or
        ``rebuild`` is given the arrays of another model.

    Example:
      >>> import equinox as eqx
      >>> import shardinit
      >>> from shardinit.frontends import equinox as frontend
      >>> model = shardinit.init(frontend.init_fn(eqx.nn.MLP, 3, 8, 64, 2), 42)
      >>> model.layers[0].weight.shape, model.depth
      ((64, 3), 2)
    """
    name = getattr(model, "__name__", type(model).__name__)
    _check(model, name, args, kwargs)
    found: dict[str, Any] = {}

    def fn(key: jax.Array) -> Any:
        made = model(*args, key=key, **kwargs)
        if not found:  # the first trace, whose result JAX keeps for the traces to come
            leaves, found["structure"] = jax.tree.flatten(made)
            found["kept"] = [_HOLE if eqx.is_array(x) else x for x in leaves]
        arrays = eqx.filter(made, eqx.is_array)
        found.setdefault("axes", _axes(arrays))
        return arrays

    with collector_paused(), watched() as host:
        _, shapes = trace(fn, jax.eval_shape(jax.random.key, 0))
    structure, kept = found["structure"], found["kept"]
    refuse_static_tracers(structure.unflatten(kept), structure)
    paths = _paths(shapes)

    def rebuild(arrays: Any) -> Any:
        given = _paths(arrays)
        if given != paths:
            raise InitFnError(
                name,
                f"cannot be rebuilt from the leaves {given[:8]}",
                f"those of its own arrays, {paths[:8]}",
            )
        values = iter(jax.tree.leaves(arrays))
        return structure.unflatten([next(values) if x is _HOLE else x for x in kept])

    return InitFn(
        fn,
        axes=found["axes"],
        rebuild=rebuild,
        state_of=_state_of,
        trainable=_trainable,
        name=name,
        draws_on_host=host.moved,
        asks_process=host.asked,
        again=lambda: init_fn(model, *args, **kwargs),
    )
