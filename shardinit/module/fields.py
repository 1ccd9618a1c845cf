"""Field declarations: the kinds of fields, initialisers and inputs.

The *kind* of a field says what the field is for, and ``node`` or ``static`` says
whether it is part of the pytree::

    w: jax.Array | None = Parameter.node()      # trained, a leaf
    mean: jax.Array | None = BatchStat.node()   # kept, a leaf, not trained
    features: int                               # static, unless it holds modules

Kinds are classes, and filters accept subclasses: ``filter(State)`` keeps `Rng`,
`BatchStat` and `Cache` fields too. The declarations are `dataclasses.field` objects, so
a module class may also be a ``@dataclass``.

An `Initializer` is the placeholder of a value that needs only a key. It is a pytree
node without leaves, so it may be passed through ``jax.jit``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import MISSING
from typing import Any

import jax
import numpy as np


def _field(node: bool, kind: type | None, default: Any, options: Any) -> Any:
    axes = options.pop("axes", None)
    metadata = {"node": node, "kind": kind, "axes": axes}
    return dataclasses.field(default=default, metadata=metadata, **options)


def node(default: Any = MISSING, **options: Any) -> Any:
    """Declares a pytree field without a kind (see ``Kind.node``).

    Example:
      >>> from shardinit.module import Module, node
      >>> class Counter(Module):
      ...     count: int = node(0)
      >>> import jax
      >>> jax.tree.leaves(Counter())
      [0]
    """
    return _field(True, None, default, options)


def static(default: Any = MISSING, **options: Any) -> Any:
    """Declares a static field without a kind (see ``Kind.static``).

    Example:
      >>> import jax
      >>> from shardinit.module import Linear, Module, static
      >>> class Holder(Module):
      ...     layer: Linear | None = static(None)
      >>> jax.tree.leaves(Holder())
      []
    """
    return _field(False, None, default, options)


class Kind:
    """Base class of all kinds; a subclass of it, or of a kind below, is a new kind.

    Example:
      >>> from shardinit.module import Kind, Module
      >>> class Mask(Kind):
      ...     pass
      >>> class Masked(Module):
      ...     mask: float = Mask.node(1.0)
      >>> Masked().filter(Mask)
      Masked(mask=1.0)
    """

    @classmethod
    def node(cls, default: Any = MISSING, **options: Any) -> Any:
        """Declares a pytree field of this kind.

        Args:
          default: the value of the field if ``__init__`` assigns none.
          **options: ``axes``, a tuple with one logical axis name (or None) for each
            dimension, which ``AxisRules`` map to mesh axes; and the options of
            ``dataclasses.field`` (``default_factory``, ``init``, ``repr``, …).

        Example:
          >>> from shardinit.module import Module, Parameter
          >>> class Scale(Module):
          ...     factor: float = Parameter.node(2.0, axes=())
          >>> Scale().field_axes()
          {'factor': ()}
        """
        return _field(True, cls, default, options)

    @classmethod
    def static(cls, default: Any = MISSING, **options: Any) -> Any:
        """Declares a static field of this kind; takes the options of ``node``.

        Example:
          >>> import jax
          >>> from shardinit.module import Module, Parameter
          >>> class Scale(Module):
          ...     factor: float = Parameter.static(2.0)
          >>> jax.tree.leaves(Scale())
          []
        """
        return _field(False, cls, default, options)


class Parameter(Kind):
    """A trainable value.

    Example:
      >>> import jax
      >>> from shardinit.module import Module, Parameter
      >>> class Scale(Module):
      ...     factor: float = Parameter.node(2.0)
      ...     steps: int = 3
      >>> jax.tree.leaves(Scale().parameters())
      [2.0]
    """


class State(Kind):
    """A value that is updated without being trained.

    Example:
      >>> from shardinit.module import BatchStat, Rng, State
      >>> issubclass(BatchStat, State), issubclass(Rng, State)
      (True, True)
    """


class Rng(State):
    """A random key that a layer holds.

    Example:
      >>> import jax
      >>> from shardinit.module import Dropout, Rng
      >>> len(jax.tree.leaves(Dropout(0.5).init(42).filter(Rng)))
      1
    """


class ModelState(State):
    """State of the model, such as statistics and caches.

    Example:
      >>> from shardinit.module import BatchStat, Cache, ModelState, OptState
      >>> [issubclass(kind, ModelState) for kind in (BatchStat, Cache, OptState)]
      [True, True, False]
    """


class BatchStat(ModelState):
    """Running statistics over batches.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from shardinit.module import BatchNorm, BatchStat
      >>> norm = BatchNorm().init(42, jnp.ones((2, 3)))
      >>> len(jax.tree.leaves(norm.filter(BatchStat)))
      2
    """


class Cache(ModelState):
    """Values kept between calls, such as keys and values of attention.

    Example:
      >>> from shardinit.module import Cache, Module
      >>> class Memory(Module):
      ...     last: float = Cache.node(0.0)
      >>> Memory().filter(Cache)
      Memory(last=0.0)
    """


class OptState(State):
    """The state of an optimizer.

    Example:
      >>> from shardinit.module import Module, OptState
      >>> class Momentum(Module):
      ...     velocity: float = OptState.node(0.0)
      >>> Momentum().filter(OptState)
      Momentum(velocity=0.0)
    """


class Log(Kind):
    """A value to be logged, such as a loss or a metric.

    Example:
      >>> from shardinit.module import Log, Module, Parameter
      >>> class Logged(Module):
      ...     weight: float = Parameter.node(1.0)
      ...     loss: float = Log.node(0.0)
      >>> Logged().filter(Log)
      Logged(weight=Nothing, loss=0.0)
    """


@jax.tree_util.register_pytree_node_class
class Initializer:
    """Placeholder of a value; ``init`` replaces it by ``fn(next_key())``.

    Example:
      >>> import jax
      >>> from shardinit.module import Initializer, Module, Parameter
      >>> class Table(Module):
      ...     rows: jax.Array | Initializer = Parameter.node()
      ...
      ...     def __init__(self):
      ...         self.rows = Initializer(lambda key: jax.random.normal(key, (4, 2)))
      >>> Table()
      Table(rows=Initializer)
      >>> Table().init(42).rows.shape
      (4, 2)
    """

    def __init__(self, fn: Callable[[jax.Array], Any]):
        """Makes an initialiser.

        Args:
          fn: maps a key to the initial value of the field, an array or a pytree.
        """
        self.fn = fn

    def __call__(self, key: jax.Array) -> Any:
        """Returns the initial value for ``key``."""
        return self.fn(key)

    # It is its own static data in the pytree, by which ``jax.jit`` finds what it has
    # compiled: without these two every copy of a module would compile anew.
    def __eq__(self, other: object) -> bool:
        return isinstance(other, Initializer) and self.fn == other.fn

    def __hash__(self) -> int:
        return hash(self.fn)

    def __repr__(self) -> str:
        return "Initializer"

    def tree_flatten(self) -> tuple[tuple[()], Initializer]:
        """Returns no children."""
        return (), self

    @classmethod
    def tree_unflatten(cls, aux: Initializer, children: Any) -> Initializer:
        """Returns the initialiser itself."""
        return aux


# Registered itself: JAX looks a class up exactly, and a subclass would be a leaf.
@jax.tree_util.register_pytree_node_class
class LeftOut(Initializer):
    """Placeholder of a value that a plan with ``select`` did not make.

    A later ``init`` makes it as the initialisation that left it out would have: by the
    place of its leaf in the whole function, whose keys others have not used.

    Attributes:
      fn: maps the root key to all leaves of that initialisation.
      number: the place of the leaf.
    """

    def __init__(self, fn: Callable[[jax.Array], Any], number: int):
        super().__init__(fn)
        self.number = number

    def __eq__(self, other: object) -> bool:
        return super().__eq__(other) and self.number == getattr(other, "number", None)

    def __hash__(self) -> int:
        return hash((self.fn, self.number))


@jax.tree_util.register_pytree_node_class
class Nothing:
    """Placeholder of a value that ``filter`` removed; a pytree node without leaves.

    Example:
      >>> import jax
      >>> from shardinit.module import NOTHING, Module, Parameter, Rng
      >>> class Scale(Module):
      ...     factor: float = Parameter.node(2.0)
      >>> rest = Scale().filter(Rng)
      >>> rest
      Scale(factor=Nothing)
      >>> rest.factor == NOTHING, jax.tree.leaves(rest)
      (True, [])
    """

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Nothing)

    def __hash__(self) -> int:
        return 0

    def __repr__(self) -> str:
        return "Nothing"

    def tree_flatten(self) -> tuple[tuple[()], None]:
        """Returns no children."""
        return (), None

    @classmethod
    def tree_unflatten(cls, aux: None, children: Any) -> Nothing:
        """Returns a new instance."""
        return cls()


NOTHING = Nothing()


class Inputs:
    """Arguments of a forward call: ``Inputs(x, mask=mask)``.

    Attributes:
      args: positional arguments.
      kwargs: keyword arguments.

    Example:
      >>> from shardinit.module import Inputs
      >>> Inputs(1, scale=2)
      Inputs(1, scale=2)
      >>> Inputs(1, scale=2).kwargs
      {'scale': 2}
    """

    def __init__(self, *args: Any, **kwargs: Any):
        self.args = args
        self.kwargs = kwargs

    @classmethod
    def from_value(cls, value: Any) -> Inputs:
        """Takes a tuple as ``*args``, a dict as ``**kwargs``, else one argument.

        Example:
          >>> from shardinit.module import Inputs
          >>> Inputs.from_value({"scale": 2}), Inputs.from_value((1, 2))
          (Inputs(scale=2), Inputs(1, 2))
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, tuple):
            return cls(*value)
        if isinstance(value, dict):
            return cls(**value)
        return cls(value)

    def __repr__(self) -> str:
        parts = [*map(repr, self.args), *(f"{k}={v!r}" for k, v in self.kwargs.items())]
        return f"Inputs({', '.join(parts)})"


@dataclasses.dataclass(frozen=True)
class FieldInfo:
    """A leaf and its field, as passed to the predicates of ``filter``.

    Attributes:
      name: the name of the field.
      kind: the kind of the field, or None.
      value: the leaf.
      module: the module that has the field; None for a leaf outside of all modules.
      path: the path of the leaf from the root, joined by ``/``.

    Example:
      >>> from shardinit.module import FieldInfo, Module, Parameter
      >>> class Affine(Module):
      ...     scale: float = Parameter.node(2.0)
      ...     shift: float = Parameter.node(1.0)
      >>> def is_scale(field: FieldInfo) -> bool:
      ...     return field.path == "scale"
      >>> Affine().filter(is_scale)
      Affine(scale=2.0, shift=Nothing)
    """

    name: str
    kind: type | None
    value: Any
    module: Any
    path: str


def is_empty(value: Any) -> bool:
    """Whether a field holds no value yet: None, an `Initializer`, or `Nothing`."""
    return value is None or isinstance(value, (Initializer, Nothing))


def is_array(value: Any) -> bool:
    """Whether a leaf is an array: concrete, traced or abstract, but no scalar."""
    shaped = hasattr(value, "shape") and hasattr(value, "dtype")
    return shaped and not isinstance(value, np.generic)
