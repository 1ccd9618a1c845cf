"""Flax NNX: a model is an object whose constructor draws its own weights.

NNX has no init function: ``Model(..., rngs=nnx.Rngs(key))`` both describes the model
and fills it. Seen as a function of the key, the constructor is pure: split what it
builds into a static graph and a state, and the state is a pytree of arrays that
`jax.make_jaxpr` can trace. Shared submodules appear once in it, and the graph
remembers where else they belong, so merging the graph with arrays, however those
were made, gives the model back.

Two habits of NNX need care. *Eager sharding*: a Variable that carries a sharding
constrains its value as soon as it is created and asks for a mesh to do so. Here
placement is decided by the plan, so the names are only read, as logical axes.
*Counting*: an `nnx.RngStream` folds a counter into its key at each draw and keeps the
counter as an array, which under a trace makes a chain of additions as long as the
model, and some versions of JAX search that chain at every step. The streams handed
to the constructor count with numbers instead: the keys are the same, and the trace is
linear in the size of the model.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from shardinit.core.host_state import watched
from shardinit.core.init_fn import AxisNames, InitFn, check_structure
from shardinit.core.ir.jaxpr import collector_paused, without_mesh
from shardinit.core.paths import nested
from shardinit.core.plan.carried import box_axes
from shardinit.errors import InitFnError
from shardinit.extras import needs
from shardinit.frontends import check_arguments

with needs("flax", "shardinit[flax]"):
    from flax import nnx
    from flax.core.spmd import get_logical_axis_rules

# inlined: the same one equation in a trace, without the checks of its arguments
_fold_in = jax.jit(jax.random.fold_in, inline=True)


class _CountingStream(nnx.RngStream):
    """An `nnx.RngStream` that counts with a number for as long as it may."""

    def __init__(self, key: jax.Array, *, tag: str):
        super().__init__(key, tag=tag)
        if not self.key.shape:
            self._set_count(np.uint32(0))

    def __call__(self) -> jax.Array:
        count = self.count.get_value()
        if not isinstance(count, np.generic | np.ndarray) or count.ndim:
            return super().__call__()  # lifted by a transformation: an array again
        self._set_count(np.uint32(count + 1))
        return _fold_in(self.key.get_value(), np.uint32(count))

    def _set_count(self, count: Any) -> None:
        self.count.set_value(count)


def _build(model: Callable[..., Any], args: tuple, kwargs: dict, key: Any) -> Any:
    """Returns ``model(*args, rngs=..., **kwargs)``, built without eager sharding."""
    streams = key if isinstance(key, dict) else {"default": key}
    # Else a Variable with names asks for a mesh where it is made: "An auto mesh context
    # or metadata is required" (Flax 0.12.8).
    with nnx.use_eager_sharding(False):
        rngs = nnx.Rngs(**streams)
        for name, one in streams.items():
            setattr(rngs, name, _CountingStream(one, tag=name))
        return model(*args, rngs=rngs, **kwargs)


def _plain_streams(model: Any) -> nnx.GraphDef:
    """The graph of ``model``, of which the user shall see Flax's own streams."""
    for _, node in nnx.iter_graph(model):
        if type(node) is _CountingStream:
            object.__setattr__(node, "__class__", nnx.RngStream)
    return nnx.graphdef(model)


def _nest(state: nnx.State, leaf: Callable[[Any], Any]) -> dict:
    """Nested plain dicts shaped like ``state``, ``leaf`` applied to each entry."""
    flat = nnx.to_flat_state(state)
    return nested((path for path, _ in flat), (leaf(entry) for _, entry in flat))


def _arrays(entry: Any) -> Any:
    value = entry.get_raw_value() if isinstance(entry, nnx.Variable) else entry
    return jax.tree.map(
        lambda x: jnp.asarray(x) if isinstance(x, np.generic | np.ndarray) else x, value
    )


def _state_of(model: Any) -> Any:
    """The plain dicts of a model or of (part of) its state; other trees as they are."""
    state = nnx.state(model) if isinstance(model, nnx.Module) else model
    return _nest(state, _arrays) if isinstance(state, nnx.State) else state


def _axes(entry: Any) -> Any:
    """The axis names of one state entry, or None a leaf.

    Flax reads a name without a rule as a mesh axis, and lets a Variable bring rules
    and a mesh of its own.
    """
    value = entry.get_raw_value() if isinstance(entry, nnx.Variable) else entry
    if not isinstance(entry, nnx.Variable) or not hasattr(value, "shape"):
        return jax.tree.map(lambda _: None, value)
    names = box_axes(entry, value.ndim)
    if isinstance(entry, nnx.OptState):
        return (names or AxisNames((), value.ndim)).of_optimizer()
    return names


def _check(model: Any, name: str, args: tuple, kwargs: dict[str, Any]) -> None:
    """Refuses what makes no NNX module, and arguments that it does not take."""
    where, wanted = "nnx.init_fn", "an nnx.Module class, or a function that makes one"
    linen = sys.modules.get("flax.linen")
    kind = model if isinstance(model, type) else type(model)
    if linen is not None and issubclass(kind, linen.Module):
        remedy = f"shardinit.frontends.linen.init_fn({name}(...), *inputs)"
        raise InitFnError(where, f"got {name}, a Linen module", wanted, remedy)
    if isinstance(model, nnx.Module):
        remedy = f"nnx.init_fn({name}, ...), with the arguments of its constructor"
        raise InitFnError(where, f"got a {name} that is made", wanted, remedy)
    if not callable(model):
        raise InitFnError(where, f"got {name}", wanted)
    if "rngs" in kwargs or any(isinstance(x, nnx.Rngs) for x in args):
        raise InitFnError(
            where,
            "rngs were given",
            "the other arguments: rngs are made of the key at each init",
            f"shardinit.init(nnx.init_fn({name}, ...), key)",
        )
    check_arguments(f"nnx.init_fn({name}, ...)", model, args, {**kwargs, "rngs": None})


def init_fn(model: Callable[..., Any], *args: Any, **kwargs: Any) -> InitFn:
    """Makes an `InitFn` of the constructor of a Flax NNX model.

    The function's result is the whole state of the model (``nnx.state``) as nested
    plain dicts of arrays, integer keys where NNX has integer paths: parameters, batch
    statistics, and the random state of stateful layers, whose keys stay typed key
    arrays and whose counts are uint32. ``rebuild`` returns the model with the given
    arrays in its Variables; ``axes`` holds the names that Variables carry as sharding
    metadata.

    A mapping of names to keys is a key of each stream: ``key={"params": 0, "dropout":
    1}`` builds the model with ``nnx.Rngs(params=..., dropout=...)``.

    Building the `InitFn` traces the constructor once and allocates nothing. Variables
    of the rebuilt model have eager sharding off: their arrays are placed already.

    Args:
      model: an `nnx.Module` class, or a function that returns a module; called as
        ``model(*args, rngs=rngs, **kwargs)``.
      *args: positional arguments of the constructor.
      **kwargs: keyword arguments of the constructor.

    Returns:
      An `InitFn`. Its values are those of
      ``jax.jit(lambda key: nnx.state(model(*args, rngs=nnx.Rngs(key), **kwargs)))``,
      bit for bit.

    Raises:
      InitFnError: ``model`` is something else or does not take the arguments, or
        ``rebuild`` is given the arrays of another model.

    Example:
      >>> import shardinit
      >>> from flax import nnx
      >>> from shardinit.frontends import nnx as frontend
      >>> model = shardinit.init(frontend.init_fn(nnx.Linear, 3, 8), 42)
      >>> model.kernel.shape
      (3, 8)
    """
    name = getattr(model, "__name__", type(model).__name__)
    _check(model, name, args, kwargs)
    return _init_fn(model, args, kwargs, name, ())


def _init_fn(
    model: Callable[..., Any],
    args: tuple,
    kwargs: dict[str, Any],
    name: str,
    streams: tuple[str, ...],
) -> InitFn:
    """``init_fn`` of one key, or of keys by the names of streams."""
    found: dict[str, Any] = {}

    def fn(key: Any) -> dict:
        built = _build(model, args, kwargs, key)
        if found:
            return _nest(nnx.state(built), _arrays)
        # the first trace, whose result JAX keeps for the traces to come
        graphdef, state = nnx.split(built)
        if any(isinstance(entry, nnx.RngKey) for _, entry in nnx.to_flat_state(state)):
            graphdef = _plain_streams(built)
        found["graphdef"] = graphdef
        found["axes"] = _nest(state, _axes)
        found["treedef"] = jax.tree.structure(state)
        return _nest(state, _arrays)

    with collector_paused(), watched() as host:
        one = jax.eval_shape(jax.random.key, 0)
        key = dict.fromkeys(streams, one) if streams else one
        shapes = without_mesh(lambda: jax.eval_shape(fn, key))
    structure = jax.tree.structure(shapes)
    graphdef, treedef, axes = found["graphdef"], found["treedef"], found["axes"]

    def rebuild(arrays: Any) -> Any:
        check_structure(arrays, structure, name)
        return nnx.merge(graphdef, jax.tree.unflatten(treedef, jax.tree.leaves(arrays)))

    return InitFn(
        fn,
        axes=axes,
        rebuild=rebuild,
        state_of=_state_of,
        trainable=lambda model: nnx.state(model, nnx.Param),
        name=name,
        context_rules=get_logical_axis_rules,
        draws_on_host=host.moved,
        asks_process=host.asked,
        again=lambda: _init_fn(model, args, kwargs, name, streams),
        of_streams=lambda names: _init_fn(model, args, kwargs, name, names),
    )
