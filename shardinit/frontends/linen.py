"""Flax Linen: ``module.init(key, *inputs)`` is an init function already.

Two things stand between it and an `InitFn`. Linen wraps annotated parameters in
boxes (`nn.Partitioned`, `nn.LogicallyPartitioned`), which carry the names of the
dimensions; boxes are metadata, so they are taken off here, read as logical axes and
put back by ``rebuild``. And Linen asks for example inputs, of which shapes will do.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax

from shardinit.core.host_state import watched
from shardinit.core.init_fn import AxisNames, InitFn, Name, check_structure
from shardinit.core.ir.examples import Examples
from shardinit.core.paths import path_str
from shardinit.core.plan.carried import box_axes
from shardinit.errors import InitFnError
from shardinit.extras import needs
from shardinit.frontends import check_arguments

with needs("flax", "shardinit[flax]"):
    from flax import linen as nn
    from flax.core import meta
    from flax.core.spmd import get_logical_axis_rules
    from flax.linen import partitioning

# keyword arguments of Module.init that are not the method's
_OF_INIT = ("method", "mutable", "capture_intermediates")


def _is_box(x: Any) -> bool:
    return isinstance(x, meta.AxisMetadata)


def _content(box: Any) -> Any:
    # Partitioned.unbox constrains the value to the mesh of the context by default
    if isinstance(box, meta.Partitioned):
        return box.unbox(apply_constraint=False)
    return box.unbox()


def _unbox(tree: Any) -> Any:
    return jax.tree.map(
        lambda x: _unbox(_content(x)) if _is_box(x) else x, tree, is_leaf=_is_box
    )


def _names(tree: Any) -> Any:
    """The tree of axis names, shaped like the unboxed ``tree``."""
    sown = _sown_names(tree)

    def of_leaf(path: Any, x: Any) -> Any:
        content = _unbox(x)
        if not hasattr(content, "ndim"):
            return jax.tree.map(lambda _: None, content)
        if _is_box(x):
            return box_axes(x, content.ndim)
        names = sown.get(path_str(path))
        return None if names is None else AxisNames(names, content.ndim)

    return jax.tree_util.tree_map_with_path(of_leaf, tree, is_leaf=_is_box)


def _trainable(variables: Any) -> Any:
    """What ``TrainState.create`` gets: the parameters, or all where there are none."""
    return variables.get("params", variables)


def _sown_names(tree: Any) -> dict[str, tuple[Name, ...]]:
    """Names by path that ``param_with_axes`` and the like sow beside the variables.

    The names of ``params/dense/kernel`` are at ``params_axes/dense/kernel_axes``.
    """

    def is_sown(x: Any) -> bool:
        return isinstance(x, partitioning.AxisMetadata)

    sown: dict[str, tuple[Name, ...]] = {}
    for path, x in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_sown):
        if not is_sown(x) or x.names is None:
            continue
        collection, *inner = path_str(path).split("/")
        of = "/".join((collection.removesuffix("_axes"), *inner))
        sown[of.removesuffix("_axes")] = tuple(x.names)
    return sown


def _without_eager_sharding() -> AbstractContextManager[Any]:
    """NNX Variables inside Linen must not ask for a mesh: the plan places them.

    Flax loads NNX only for who uses it; without it there are no Variables.
    """
    nnx = sys.modules.get("flax.nnx")
    return nullcontext() if nnx is None else nnx.use_eager_sharding(False)


def _check(module: Any, inputs: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Refuses what is no Linen module, and inputs that it does not take."""
    name = getattr(module, "__name__", type(module).__name__)
    nnx = sys.modules.get("flax.nnx")
    if not isinstance(module, nn.Module):
        got = f"got {name}"
        remedy = f"linen.init_fn({name}(...), *inputs)"
        if isinstance(module, type) and issubclass(module, nn.Module):
            got = f"got the class {name}"
        elif nnx is not None and isinstance(module, nnx.Module):
            got += ", an nnx module"
            remedy = f"shardinit.frontends.nnx.init_fn({name}, ...)"
        else:
            remedy = "A function of the key needs no front end: shardinit.init(fn, key)"
        raise InitFnError("linen.init_fn", got, "a Linen module", remedy)
    method = kwargs.get("method") or getattr(module, "__call__", None)  # noqa: B004
    if isinstance(method, str):
        method = getattr(module, method, None)
    if method is not None:
        own = () if hasattr(method, "__self__") else (module,)
        options = {k: v for k, v in kwargs.items() if k not in _OF_INIT}
        check_arguments(
            f"linen.init_fn({name}(...), ...)", method, (*own, *inputs), options
        )


def init_fn(module: nn.Module, *inputs: Any, **kwargs: Any) -> InitFn:
    """Makes an `InitFn` of a Linen module and the shapes of its inputs.

    The function's result is what ``module.init(key, *inputs, **kwargs)`` returns, bit
    for bit, without boxes: collections, then variables, as nested dicts of arrays.
    ``axes`` holds the names from the boxes and ``rebuild`` puts the boxes back.

    A mapping of names to keys is a key of each stream, as ``module.init`` takes it:
    ``key={"params": 0, "dropout": 1}``.

    Building the `InitFn` traces the module and allocates nothing.

    Args:
      module: the Linen module.
      *inputs: example inputs of the module, any pytrees of arrays or
        `jax.ShapeDtypeStruct`; other leaves are passed on as they are.
      **kwargs: keyword arguments of ``module.init``, arrays treated likewise.

    Raises:
      InitFnError: it is no Linen module, does not take these inputs, or a shape stands
        in the place of one; a variable depends on the value of an input of which only
        the shape is given; ``rebuild`` is given the arrays of another module.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import shardinit
      >>> from flax import linen as nn
      >>> from shardinit.frontends import linen
      >>> fn = linen.init_fn(nn.Dense(8), jax.ShapeDtypeStruct((1, 3), jnp.float32))
      >>> shardinit.init(fn, 42)["params"]["kernel"].shape
      (3, 8)
    """
    _check(module, inputs, kwargs)
    name = module.name or type(module).__name__
    examples = Examples(inputs, kwargs)

    found: dict[str, Any] = {}

    def init(key: Any, values: Sequence[Any]) -> Any:
        args, options = examples.arguments(values)
        with _without_eager_sharding():
            boxed = module.init(key, *args, **options)
        variables = _unbox(boxed)
        if not found:
            found["axes"], found["treedef"] = _names(boxed), jax.tree.structure(boxed)
            found["unboxed"] = jax.tree.structure(variables)
        return variables

    with watched() as host:
        fn = examples.bound(init, name)
    axes, treedef, unboxed = found["axes"], found["treedef"], found["unboxed"]

    def rebuild(tree: Any) -> Any:
        check_structure(tree, unboxed, name)
        return jax.tree.unflatten(treedef, jax.tree.leaves(tree))

    return InitFn(
        fn,
        axes=axes,
        rebuild=rebuild,
        state_of=_unbox,
        trainable=_trainable,
        name=name,
        context_rules=get_logical_axis_rules,
        draws_on_host=host.moved,
        asks_process=host.asked,
        again=lambda: init_fn(module, *inputs, **kwargs),
    )
