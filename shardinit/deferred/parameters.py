"""Parameters: a value with a name, or a strategy with a name and no value yet.

`UninitializedParameter` is what model-building code makes: it says how the value will
be drawn and what it will look like, and holds no array. A model of them can be built,
shown, renamed and planned at any size. Then each becomes a `Parameter`, in one of three
ways: drawn from a key (`initialize`), given (`initialize_with_value`, from a checkpoint
say), or left abstract for something else to fill (`as_empty_parameter`).

Layers annotate what they hold as `ParameterLike` and read ``.value``, and never ask
which of the kinds it is.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, Generic, Protocol, Self, TypeVar

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
    """What a layer may expect of anything that stands for a parameter.

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
        """The value. May raise: one that is not initialised, or is shared, has none."""
        ...

    @property
    def value_structure(self) -> structure.Structure:
        """Shape, dtype and, when known, axis names of the value. Never raises."""
        ...


class SupportsParameterRenaming(abc.ABC):
    """Base of every node that has parameter names.

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
        """A copy with ``rename_fn`` applied to each name."""


class _Renamed(SupportsParameterRenaming):
    def with_renamed_parameters(self, rename_fn: Callable[[str], str]) -> Self:
        """A copy with the name ``rename_fn(name)``; nothing is traced again."""
        assert isinstance(self, Struct)
        fields = self.attributes_dict()
        return type(self).from_attributes(**{**fields, "name": rename_fn(self.name)})

    name: str


@pytree_dataclass
class Parameter(Struct, Generic[T], _Renamed):
    """A learnable parameter.

    Attributes:
      value: the value, any pytree of arrays.
      name: what it is called, in checkpoints too.

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

    @property
    def value_structure(self) -> structure.Structure:
        """Shape and dtype of each leaf of the value."""
        return structure.structure_of(self.value)

    def treescope_color(self) -> str:
        """Green: it learns."""
        return "#9fd8a4"


@pytree_dataclass
class FrozenParameter(Struct, Generic[T], _Renamed):
    """A parameter that does not learn; no instance of `Parameter`.

    Attributes:
      value: the value, any pytree of arrays.
      name: what it is called, in checkpoints too.

    Example:
      >>> from shardinit import deferred
      >>> frozen = deferred.FrozenParameter(1.0, "scale")
      >>> isinstance(frozen, deferred.Parameter)
      False
    """

    value: T
    name: str = dataclasses.field(metadata=_STATIC)

    @property
    def value_structure(self) -> structure.Structure:
        """Shape and dtype of each leaf of the value."""
        return structure.structure_of(self.value)

    def treescope_color(self) -> str:
        """Ice."""
        return "#bcd4de"


@pytree_dataclass
class UninitializedParameter(Struct, Generic[T], _Renamed):
    """A parameter that has a strategy and a name, and no value yet.

    All fields are static: a model of these has no leaves.

    Attributes:
      initializer: the key to the value.
      name: what the parameter is called; its key derives from it.
      value_structure: what the initializer returns, with an `AbstractArray` for each
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
        """Makes the parameter; without ``value_structure`` traces the initializer.

        Args:
          initializer: the key to the value.
          name: what the parameter is called.
          value_structure: a pytree with something that has a shape and a dtype for each
            array, such as ``jax.ShapeDtypeStruct``; None says that the value is None.
            Left out, it is inferred by ``jax.eval_shape`` on a key.
        """
        if value_structure is _INFER:
            try:
                inferred = structure.infer(initializer)
            except Exception as error:
                error.add_note(f"in the initializer of parameter {name!r}")
                raise
        else:
            inferred = structure.structure_of(value_structure)
        object.__setattr__(self, "initializer", initializer)
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "value_structure", inferred)

    def initialize(self, prng_key: jax.Array) -> Parameter[T]:
        """Draws the value: runs the initializer once and checks what it returned.

        Args:
          prng_key: the key that the initializer gets.

        Raises:
          StructureMismatchError: the initializer returned another structure than
            ``value_structure``.
        """
        value = structure.as_arrays(self.initializer(prng_key))
        where = f"initializer of parameter {self.name!r}"
        structure.check(where, value, self.value_structure)
        return Parameter(value, self.name)

    def initialize_with_value(
        self, value: T, check_structure: bool = True, strict_dtype: bool = True
    ) -> Parameter[T]:
        """Takes a value instead of drawing one; never casts it.

        Args:
          value: the value.
          check_structure: whether its structure must be ``value_structure``.
          strict_dtype: whether the dtypes must be the same as well; without
            ``check_structure`` of no meaning.

        Raises:
          StructureMismatchError: with the path in the value, what is there and what
            was expected.
        """
        if check_structure:
            where = f"value for parameter {self.name!r}"
            structure.check(where, value, self.value_structure, dtypes=strict_dtype)
        return Parameter(value, self.name)

    def as_empty_parameter(self) -> Parameter[T]:
        """A `Parameter` of ``jax.ShapeDtypeStruct``, for a checkpoint to be restored.

        Nothing runs; the tree of the value is the one that the initializer would give.
        """
        value: Any = structure.empty_of(self.value_structure)
        return Parameter(value, self.name)

    @property
    def value(self) -> T:
        """No value yet.

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

    def treescope_color(self) -> str:
        """Sand: nothing has grown yet."""
        return "#e2c48d"
