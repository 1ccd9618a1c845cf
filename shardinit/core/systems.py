"""Which library's object a node is, so that one is never taken for another's.

Several libraries have parameters that wait for a value, and a function that looks for
those of its own would walk past all others in silence. And a model is callable in most
libraries, so that it could be taken for the init function that is meant. The classes
are known by their names: none of the libraries is imported for it.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from typing import Any

import jax

from shardinit.core.paths import path_str
from shardinit.core.types import Tree
from shardinit.errors import InitFnError


@dataclass(frozen=True)
class System:
    """A library of models.

    Attributes:
      name: what to call an object of it.
      remedy: how an init function is made of one.
      waits: whether it has parameters that wait for a value in a tree.
    """

    name: str
    remedy: str
    waits: bool = False


DEFERRED = System(
    "a parameter of shardinit.deferred",
    "shardinit.deferred.init_fn(model) makes an init function of the model",
    waits=True,
)
MODULE = System(
    "a module of shardinit.module that is not initialised",
    "shardinit.module.init_fn(module, inputs) makes an init function of it",
    waits=True,
)
PENZAI = System(
    "a parameter of Penzai's first version",
    "shardinit.frontends.penzai.init_fn(model) makes an init function of the model",
    waits=True,
)
_PENZAI2 = System(
    "a variable or a slot of Penzai's second version",
    "shardinit.frontends.penzai.init_fn(build) makes an init function of what builds "
    "the model with init_base_rng",
    waits=True,
)
_LINEN = System(
    "a module of Flax Linen",
    "shardinit.frontends.linen.init_fn(module, *inputs) makes an init function of it",
)
_NNX = System(
    "a module of Flax NNX",
    "shardinit.frontends.nnx.init_fn(Model, *args, **kwargs) makes an init function of "
    "its constructor",
)
_EQUINOX = System(
    "a module of Equinox",
    "shardinit.frontends.equinox.init_fn(Model, *args, **kwargs) makes an init "
    "function of its constructor",
)
_HAIKU = System(
    "a transformed function of Haiku",
    "shardinit.frontends.haiku.init_fn(transformed, *inputs) makes an init function "
    "of it",
)
_KERAS = System(
    "a layer of Keras",
    "shardinit.frontends.keras.init_fn(model) makes an init function of it",
)
_TORCH = System(
    "a module of PyTorch",
    "shardinit.frontends.torch.init_fn(Module, *args, **kwargs) makes an init function "
    "of its constructor",
)

_V1 = "penzai.deprecated.v1.nn.parameters"
_CLASSES = {
    "shardinit.deferred.parameters.Parameter": DEFERRED,
    "shardinit.deferred.parameters.FrozenParameter": DEFERRED,
    "shardinit.deferred.parameters.UninitializedParameter": DEFERRED,
    "shardinit.module.walk.ModuleNode": MODULE,
    f"{_V1}.Parameter": PENZAI,
    f"{_V1}.FrozenParameter": PENZAI,
    f"{_V1}.UninitializedParameter": PENZAI,
    "penzai.core.variables.AbstractVariable": _PENZAI2,
    "penzai.core.variables.AbstractVariableSlot": _PENZAI2,
    "flax.linen.module.Module": _LINEN,
    "flax.nnx.module.Module": _NNX,
    "equinox._module._module.Module": _EQUINOX,
    "keras.src.layers.layer.Layer": _KERAS,
    "torch.nn.modules.module.Module": _TORCH,
    "haiku._src.transform.Transformed": _HAIKU,
    "haiku._src.transform.TransformedWithState": _HAIKU,
}


@functools.cache
def _of_class(cls: type) -> System | None:
    for parent in cls.__mro__:
        system = _CLASSES.get(f"{parent.__module__}.{parent.__qualname__}")
        if system is not None:
            return system
    return None


def _waiting(node: Any) -> System | None:
    """The system of a node that waits for a value, or is named for one."""
    system = _of_class(type(node))
    if system is MODULE and node.initialized:
        return None
    return system if system is not None and system.waits else None


def is_other(node: object, own: System) -> bool:
    """Whether a node waits for a value, or is named for one, in another system."""
    system = _waiting(node)
    return system is not None and system is not own


def refuse_others(tree: Tree, own: System, where: str) -> None:
    """Refuses a tree that holds nodes of another system than the caller's.

    Args:
      tree: a pytree.
      own: the system that the caller handles.
      where: what to call the tree in the error.

    Raises:
      InitFnError: with the first such node, by path.
    """

    def other(node: object) -> bool:
        return is_other(node, own)

    # Without paths first: JAX builds a key path for every leaf of a tree that it is
    # asked the paths of, and few trees are refused.
    if not any(map(other, jax.tree.leaves(tree, is_leaf=other))):
        return
    pairs = jax.tree_util.tree_leaves_with_path(tree, is_leaf=other)
    path, node = next(pair for pair in pairs if other(pair[1]))
    system = _waiting(node)
    assert system is not None
    raise InitFnError(
        f"{where} at {path_str(path)!r}" if path else where,
        f"{type(node).__name__} is {system.name}",
        "nodes of its own system",
        system.remedy,
    )


def refuse_models(fn: object) -> None:
    """Refuses a model, or a tree of waiting parameters, in place of an init function.

    Raises:
      InitFnError: with the front end that makes an init function of it.
    """
    system = _of_class(type(fn))
    if system is _EQUINOX:  # where a function with fields is a module as well
        return
    if isinstance(fn, type) and not _takes_one(fn):
        system = _of_class(fn)
    if system is None:
        nodes = jax.tree.leaves(fn, is_leaf=lambda node: _waiting(node) is not None)
        system = next(filter(None, map(_waiting, nodes)), None)
    if system is not None:
        raise _no_init_fn(fn, f"it is, or holds, {system.name}", system)


def refuse_failed_model(fn: object, error: Exception) -> None:
    """Refuses a model, or its class, that failed when it was called with a key.

    Raises:
      InitFnError: with the front end that makes an init function of it.
    """
    system = _of_class(fn if isinstance(fn, type) else type(fn))
    if system is not None:
        why = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        got = f"it is {system.name}, and fails if called with a key ({why})"
        raise _no_init_fn(fn, got, system) from error


def _no_init_fn(fn: object, got: str, system: System) -> InitFnError:
    name = getattr(fn, "__name__", type(fn).__name__)
    return InitFnError(
        name, got, "an init function, `key -> pytree of arrays`", system.remedy
    )


def _takes_one(cls: type) -> bool:
    """Whether a class can be called with a key alone, as an init function is."""
    try:
        # That of ``__init__``: of a class whose metaclass has a ``__call__``, as NNX's
        # and shardinit's modules, ``signature(cls)`` is ``(*args, **kwargs)`` and binds
        # all.
        inspect.signature(cls.__init__).bind(None, None)
    except (TypeError, ValueError):
        return False
    return True
