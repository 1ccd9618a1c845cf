"""Parameters: a name with a value, or with an initializer and no value yet.

Model-building code makes `UninitializedParameter`s. They have an initializer, a name
and the structure of the value, and hold no array, so that a model of any size can be
built, printed, renamed and planned. Each becomes a `Parameter` in one of three ways:
`initialize` draws the value from a key, `initialize_with_value` takes a value, for
example of a checkpoint, and `as_empty_parameter` leaves it abstract.

Layers annotate their parameters as `ParameterLike` and read ``.value``, whichever kind
of parameter they hold.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Generic, Protocol, Self, TypeVar

import jax

from shardinit.deferred import structure
from shardinit.deferred.dataclass import pytree_dataclass
from shardinit.deferred.struct import Struct
from shardinit.errors import UninitializedParameterError

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

_STATIC = {"pytree_node": False}
_INFER: Any = object()


class ParameterLike(Protocol[T_co]):
    """The interface of all kinds of parameters.

    Example:
      >>> from shardinit import deferred
      >>> def doubled(parameter: deferred.ParameterLike[float]) -> float:
      ...     return 2 * parameter.value
      >>> doubled(deferred.Parameter(1.5, "scale"))
      3.0
      >>> doubled(deferred.FrozenParameter(1.5, "scale"))
      3.0
    """

    @property
    def value(self) -> T_co:
        """The value. Raises if the parameter is uninitialised or a shared lookup."""
        ...

    @property
    def value_structure(self) -> structure.Structure:
        """Shape, dtype and, when known, axis names of the value. Never raises."""
        ...


class SupportsParameterRenaming(abc.ABC):
    """Base class of nodes that have parameter names.

    Example:
      >>> from shardinit import deferred
      >>> scale = deferred.Parameter(1.0, "scale")
      >>> isinstance(scale, deferred.SupportsParameterRenaming)
      True
      >>> scale.with_renamed_parameters(lambda name: f"block.{name}")
      Parameter(value=1.0, name='block.scale')
    """

    @abc.abstractmethod
    def with_renamed_parameters(self, rename_fn: Callable[[str], str]) -> Self:
        """Returns a copy with ``rename_fn`` applied to each name."""


class _Renamed(SupportsParameterRenaming):
    def with_renamed_parameters(self, rename_fn: Callable[[str], str]) -> Self:
        """Returns a copy with the name ``rename_fn(name)``; traces nothing."""
        assert isinstance(self, Struct)
        fields = self.attributes_dict()
        return type(self).from_attributes(**{**fields, "name": rename_fn(self.name)})

    name: str


class _Valued(_Renamed, Generic[T]):
    value: T

    @property
    def value_structure(self) -> structure.Structure:
        """Shape and dtype of each leaf of the value."""
        return structure.structure_of(self.value)


@pytree_dataclass
class Parameter(Struct, _Valued[T]):
    """A learnable parameter that has a value.

    Attributes:
      value: the value, any pytree of arrays.
      name: the name, which checkpoints use too.

    Example:
      >>> import jax.numpy as jnp
      >>> from shardinit import deferred
      >>> weight = deferred.Parameter(jnp.zeros((2, 3)), "weight")
      >>> weight
      Parameter(value=float32[2,3], name='weight')
      >>> weight.value_structure
      AbstractArray((2, 3), float32)
    """

    value: T
    name: str = dataclasses.field(metadata=_STATIC)

    _color: ClassVar[str] = "#9fd8a4"  # green


@pytree_dataclass
class FrozenParameter(Struct, _Valued[T]):
    """A parameter that is not trained; not an instance of `Parameter`.

    Attributes:
      value: the value, any pytree of arrays.
      name: the name, which checkpoints use too.

    Example:
      >>> from shardinit import deferred
      >>> frozen = deferred.FrozenParameter(1.0, "scale")
      >>> isinstance(frozen, deferred.Parameter)
      False
    """

    value: T
    name: str = dataclasses.field(metadata=_STATIC)

    _color: ClassVar[str] = "#bcd4de"  # ice blue


@pytree_dataclass
class UninitializedParameter(Struct, Generic[T], _Renamed):
    """A parameter that has an initializer and a name, and no value yet.

    All fields are static, so these parameters have no leaves.

    Attributes:
      initializer: maps a key to the value.
      name: the name of the parameter, from which its key is derived.
      value_structure: the structure of the value, with an `AbstractArray` for each
        array.

    Example:
      >>> import jax
      >>> from shardinit import deferred
      >>> weight = deferred.UninitializedParameter(
      ...     lambda key: jax.random.normal(key, (2, 3)), "weight"
      ... )
      >>> weight.value_structure
      AbstractArray((2, 3), float32)
      >>> weight.initialize(jax.random.key(42))
      Parameter(value=float32[2,3], name='weight')
    """

    initializer: Callable[[jax.Array], T] = dataclasses.field(metadata=_STATIC)
    name: str = dataclasses.field(metadata=_STATIC)
    value_structure: structure.Structure = dataclasses.field(metadata=_STATIC)

    def __init__(
        self,
        initializer: Callable[[jax.Array], T],
        name: str,
        value_structure: Any = _INFER,
    ):
        """Makes the parameter; without ``value_structure``, traces the initializer.

        Args:
          initializer: maps a key to the value.
          name: the name of the parameter.
          value_structure: a pytree that has a ``jax.ShapeDtypeStruct``, or another
            object with a shape and a dtype, for each array (Penzai's ``ArraySpec``
            is one). None means that the value is None. By default it is inferred by
            ``jax.eval_shape`` on a key.
        """
        if value_structure is _INFER:
            try:
                inferred = structure.infer(initializer)
            except Exception as error:
                error.add_note(f"in the initializer of parameter {name!r}")
                raise
        else:
            where = f"value_structure of parameter {name!r}"
            inferred = structure.declared(where, value_structure)
        self.initializer, self.name = initializer, name
        self.value_structure = inferred

    def initialize(self, prng_key: jax.Array) -> Parameter[T]:
        """Runs the initializer once and checks the structure of its result.

        Args:
          prng_key: the key that is passed to the initializer.

        Raises:
          StructureMismatchError: the initializer returned another structure than
            ``value_structure``.

        Example:
          >>> import jax
          >>> from shardinit import deferred
          >>> weight = deferred.UninitializedParameter(jax.random.normal, "w")
          >>> weight.initialize(jax.random.key(42)).value.shape
          ()
        """
        value = structure.as_arrays(self.initializer(prng_key))
        where = f"initializer of parameter {self.name!r}"
        structure.check(where, value, self.value_structure)
        return Parameter(value, self.name)

    def initialize_with_value(
        self, value: T, check_structure: bool = True, strict_dtype: bool = True
    ) -> Parameter[T]:
        """Makes the parameter from a given value, without a cast.

        Args:
          value: the value.
          check_structure: whether its structure must be ``value_structure``.
          strict_dtype: whether the dtypes must be the same too; has no effect without
            ``check_structure``.

        Raises:
          StructureMismatchError: the structures differ; it has the path in the value,
            the actual and the expected structure.

        Example:
          >>> import jax
          >>> from shardinit import deferred
          >>> weight = deferred.UninitializedParameter(jax.random.normal, "w")
          >>> weight.initialize_with_value(jax.numpy.zeros(()))
          Parameter(value=float32[], name='w')
        """
        if check_structure:
            where = f"value for parameter {self.name!r}"
            structure.check(where, value, self.value_structure, dtypes=strict_dtype)
        return Parameter(value, self.name)

    def as_empty_parameter(self) -> Parameter[T]:
        """Returns a `Parameter` of ``jax.ShapeDtypeStruct`` to restore a checkpoint.

        The initializer does not run. Its result would have the same tree structure.

        Example:
          >>> import jax
          >>> from shardinit import deferred
          >>> weight = deferred.UninitializedParameter(jax.random.normal, "w")
          >>> weight.as_empty_parameter().value
          ShapeDtypeStruct(shape=(), dtype=float32)
        """
        value: Any = structure.empty_of(self.value_structure)
        return Parameter(value, self.name)

    @property
    def value(self) -> T:
        """Raises, as there is no value yet.

        Raises:
          UninitializedParameterError: always.
        """
        raise UninitializedParameterError(
            f"parameter {self.name!r}",
            "it has no value yet",
            "an initialised parameter",
            "Initialise the model first: shardinit.init(deferred.init_fn(model), key) "
            "or deferred.initialize_parameters(model, key)",
        )

    _color: ClassVar[str] = "#e2c48d"  # the colour of sand
