"""Flax Linen: ``module.init(key, *inputs)`` is an init function already.

Two things stand between it and an `InitFn`. Linen wraps annotated parameters in
boxes (`nn.Partitioned`, `nn.LogicallyPartitioned`), which carry the names of the
dimensions; boxes are metadata, so they are taken off here, read as logical axes and
put back by ``rebuild``. And Linen asks for example inputs, of which an initialiser
sees the shapes, hardly ever the values. Inputs that do not matter become zeros made
inside the traced function, which nothing reads and which therefore cost nothing; they
need not exist at all, a `jax.ShapeDtypeStruct` will do.

Whether values matter is not guessed. The function is traced once with its inputs
batched and nothing else: a variable that comes out batched depends on an input
(data-dependent initialisation, a loss that is sown). Then the inputs are kept if they
are arrays, and refused, with the names of those variables, if they are only shapes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta
from flax.core.spmd import get_logical_axis_rules
from flax.linen import partitioning
from jax.custom_batching import custom_vmap

from shardinit.core.init_fn import AxisNames, InitFn, Name
from shardinit.core.ir.jaxpr import no_mesh
from shardinit.core.paths import path_str
from shardinit.errors import InitFnError


def _is_box(x: Any) -> bool:
    return isinstance(x, meta.AxisMetadata)


def _is_array(x: Any) -> bool:
    """Whether zeros may stand for ``x``; typed keys are passed on as they are."""
    if not (hasattr(x, "shape") and hasattr(x, "dtype")):
        return False
    return not jnp.issubdtype(x.dtype, jax.dtypes.extended)


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
            return _box_names(x, content.ndim)
        names = sown.get(path_str(path))
        return None if names is None else AxisNames(names, content.ndim)

    return jax.tree_util.tree_map_with_path(of_leaf, tree, is_leaf=_is_box)


def _box_names(box: Any, rank: int) -> AxisNames | None:
    """What a box says of its leaf.

    The names of a logical box have a meaning by rules alone; those of `nn.Partitioned`
    and of an NNX Variable bridged into Linen may be mesh axes.
    """
    metadata = getattr(box, "metadata", {})  # where a bridged Variable keeps all this
    names = getattr(box, "names", None) or metadata.get("out_sharding")
    if not names and hasattr(box, "get_partition_spec"):  # a box of somebody else's
        names = box.get_partition_spec()
    if not names:
        return None
    rules = getattr(box, "rules", None) or metadata.get("sharding_rules") or ()
    return AxisNames(
        names,
        rank,
        passes=not isinstance(box, nn.LogicallyPartitioned),
        rules=rules,
        mesh=getattr(box, "mesh", None) or metadata.get("mesh"),
    )


def _sown_names(tree: Any) -> dict[str, tuple[Name, ...]]:
    """Names by path that ``param_with_axes`` and its kin sow beside the variables.

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


def _dependent(variables: Any, batched: Sequence[bool]) -> list[str]:
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(variables)]
    return [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, hit in zip(paths, batched, strict=True)
        if hit
    ]


def _input_dependent(
    init: Callable[[jax.Array, list], Any], key: Any, inputs: list
) -> list[str] | None:
    """Paths of the variables whose values depend on the inputs' values.

    Args:
      init: from a key and the array inputs to the unboxed variables.
      key: the abstract key.
      inputs: abstract inputs.

    Returns:
      The paths, or None where the module cannot be batched, so that it is not known.
    """
    paths: list[str] = []

    @custom_vmap
    def watch(variables: Any) -> Any:
        return variables

    @watch.def_vmap
    def _(axis_size: int, in_batched: Any, variables: Any) -> Any:
        del axis_size
        paths.extend(_dependent(variables, jax.tree.leaves(in_batched[0])))
        return variables, in_batched[0]

    batch = [jax.ShapeDtypeStruct((2, *x.shape), x.dtype) for x in inputs]
    try:
        jax.eval_shape(
            jax.vmap(lambda k, xs: watch(init(k, xs)), in_axes=(None, 0)), key, batch
        )
    except Exception:  # some primitive without a batching rule: any type of error
        return None
    return paths


def init_fn(module: nn.Module, *inputs: Any, **kwargs: Any) -> InitFn:
    """Makes an `InitFn` of a Linen module and the shapes of its inputs.

    The function's result is what ``module.init(key, *inputs, **kwargs)`` returns, bit
    for bit, without boxes: collections, then variables, as nested dicts of arrays.
    ``axes`` holds the names from the boxes and ``rebuild`` puts the boxes back.

    Building the `InitFn` traces the module and allocates nothing.

    Args:
      module: the Linen module.
      *inputs: example inputs of the module, any pytrees of arrays or
        `jax.ShapeDtypeStruct`; other leaves are passed on as they are.
      **kwargs: keyword arguments of ``module.init``, arrays treated likewise.

    Raises:
      InitFnError: a variable depends on the value of an input of which only the shape
        is given, or ``rebuild`` is given the arrays of another module.

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
    name = module.name or type(module).__name__
    leaves, structure = jax.tree.flatten((inputs, kwargs))
    arrays = [i for i, x in enumerate(leaves) if _is_array(x)]
    shapes = [jax.ShapeDtypeStruct(leaves[i].shape, leaves[i].dtype) for i in arrays]
    kept = [None if i in arrays else x for i, x in enumerate(leaves)]

    def init(key: jax.Array, values: Sequence[Any]) -> Any:
        filled = list(kept)
        for i, value in zip(arrays, values, strict=True):
            filled[i] = value
        args, options = jax.tree.unflatten(structure, filled)
        with _without_eager_sharding():
            return module.init(key, *args, **options)

    found: dict[str, Any] = {}

    def describe(key: jax.Array, values: list) -> Any:
        boxed = init(key, values)
        found["axes"] = _names(boxed)
        found["treedef"] = jax.tree.structure(boxed)
        return _unbox(boxed)

    key = jax.eval_shape(jax.random.key, 0)
    with no_mesh():  # whatever mesh the caller has set, the plan places the leaves
        unboxed = jax.tree.structure(jax.eval_shape(describe, key, shapes))
    axes, treedef = found["axes"], found["treedef"]

    values: list[Any] | None = None
    if shapes:
        with no_mesh():
            depends = _input_dependent(lambda k, xs: _unbox(init(k, xs)), key, shapes)
        abstract = any(isinstance(leaves[i], jax.ShapeDtypeStruct) for i in arrays)
        if depends and abstract:
            raise InitFnError(
                depends[0],
                f"{len(depends)} variable(s) of {name} depend on the values of its "
                "inputs, of which only shapes were given",
                "variables that depend on the shapes alone",
                "Pass arrays instead of jax.ShapeDtypeStruct",
            )
        if depends or (depends is None and not abstract):
            values = [leaves[i] for i in arrays]

    def fn(key: jax.Array) -> Any:
        given = values or [jnp.zeros(s.shape, s.dtype) for s in shapes]
        return _unbox(init(key, given))

    def rebuild(tree: Any) -> Any:
        if jax.tree.structure(tree) != unboxed:
            raise InitFnError(
                name,
                f"cannot be rebuilt from {jax.tree.structure(tree)}",
                f"the structure of its own variables, {unboxed}",
            )
        return jax.tree.unflatten(treedef, jax.tree.leaves(tree))

    return InitFn(
        fn,
        axes=axes,
        rebuild=rebuild,
        name=name,
        context_rules=get_logical_axis_rules,
    )
