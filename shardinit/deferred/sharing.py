"""Shared parameters: one parameter with several uses and one copy in the tree.

A tree cannot express that two of its leaves are the same. Two copies of a tied
embedding would be initialised, stored and differentiated separately. So one node owns
the parameter, and its uses refer to it by name. While a model is built, the parameters
that may be shared are marked (`mark_shareable`) and used several times. Then
`attach_shared_parameters` collects them by name in one wrapper and puts a lookup at
each use. Before the model computes, `resolved` puts the parameter back at each use, so
that gradients with respect to the wrapper add up.

A lookup refers to the innermost enclosing wrapper that owns the name.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Generic, TypeVar

from shardinit.core.paths import path_str
from shardinit.core.systems import DEFERRED, refuse_others
from shardinit.deferred.dataclass import pytree_dataclass
from shardinit.deferred.parameters import (
    FrozenParameter,
    Parameter,
    UninitializedParameter,
)
from shardinit.deferred.selection import select
from shardinit.deferred.struct import Struct
from shardinit.deferred.structure import Structure
from shardinit.errors import MissingSharedParameterError, SharedParameterError

T = TypeVar("T")
M = TypeVar("M")

_STATIC = {"pytree_node": False}
AnyParameter = Parameter[Any] | FrozenParameter[Any] | UninitializedParameter[Any]


@pytree_dataclass(has_implicitly_inherited_fields=True, init=False)
class ShareableUninitializedParameter(UninitializedParameter[T]):
    """An uninitialised parameter that may be used several times under one name.

    Sharing is explicit, so that two layers with accidentally equal names are an error.
    Without `attach_shared_parameters` it acts as an ordinary uninitialised parameter.

    Example:
      >>> import jax
      >>> from shardinit import deferred
      >>> tied = deferred.mark_shareable(
      ...     deferred.UninitializedParameter(jax.random.normal, "tied")
      ... )
      >>> type(tied).__name__
      'ShareableUninitializedParameter'
    """

    _color: ClassVar[str] = "#d6a95c"  # the colour of dark sand


@pytree_dataclass
class SharedParameterLookup(Struct, Generic[T]):
    """A use of a parameter that an enclosing `WithSharedParameters` owns.

    Attributes:
      name: the name of the parameter when it was attached, its key in the wrapper.
      value_structure: the structure of the value of the parameter.

    Example:
      >>> import jax
      >>> from shardinit import deferred
      >>> tied = deferred.mark_shareable(
      ...     deferred.UninitializedParameter(jax.random.normal, "tied")
      ... )
      >>> model = deferred.attach_shared_parameters([tied, tied])
      >>> model.body[1]
      SharedParameterLookup(name='tied', value_structure=float32[])
    """

    name: str = dataclasses.field(metadata=_STATIC)
    value_structure: Structure = dataclasses.field(metadata=_STATIC)

    @property
    def value(self) -> T:
        """Raises, as the wrapper owns the value.

        Raises:
          MissingSharedParameterError: always. In a resolved body the parameter replaces
            the lookup.
        """
        raise MissingSharedParameterError(
            f"shared parameter {self.name!r}",
            "it was looked up outside the wrapper that owns it",
            "the parameter itself in this place",
            "Compute with wrapper.resolved(), not with wrapper.body; wrap with "
            "attach_shared_parameters what was not wrapped",
        )

    _color: ClassVar[str] = "#cdb8e8"  # lilac


@pytree_dataclass
class WithSharedParameters(Struct, Generic[M]):
    """A model (the body) together with the shared parameters that it uses.

    Attributes:
      body: the model, with a `SharedParameterLookup` at each use.
      parameters: the parameters by the names in the lookups. Renaming, for example by a
        prefix, changes the names of the parameters and not these keys.

    Example:
      >>> import jax
      >>> from shardinit import deferred
      >>> tied = deferred.mark_shareable(
      ...     deferred.UninitializedParameter(jax.random.normal, "tied")
      ... )
      >>> model = deferred.attach_shared_parameters([tied, tied])
      >>> model = deferred.initialize_parameters(model, jax.random.key(42))
      >>> first, second = model.resolved()
      >>> first is second, first
      (True, Parameter(value=float32[], name='tied'))
    """

    body: M
    parameters: dict[str, AnyParameter]

    def resolved(self) -> M:
        """Returns the body with the parameter itself at each use.

        Example:
          >>> import jax
          >>> from shardinit import deferred
          >>> draw = deferred.UninitializedParameter(jax.random.normal, "tied")
          >>> tied = deferred.mark_shareable(draw)
          >>> model = deferred.attach_shared_parameters([tied, tied])
          >>> [use.name for use in model.resolved()]
          ['tied', 'tied']
        """
        return _resolve(self.body, self.parameters)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the resolved body."""
        body: Any = self.resolved()
        return body(*args, **kwargs)

    _color: ClassVar[str] = "#b39ddb"  # violet


def _resolve(tree: Any, owned: dict[str, AnyParameter]) -> Any:
    def put(node: Any) -> Any:
        if isinstance(node, WithSharedParameters):
            return _resolve(node.body, {**owned, **node.parameters})
        return owned.get(node.name, node)

    inner = SharedParameterLookup | WithSharedParameters
    return select(tree).at_instances_of(inner).apply(put)


def mark_shareable(submodel: M) -> M:
    """Marks all uninitialised parameters of a part of a model as shareable.

    The part may then be used several times. Call `attach_shared_parameters` once on the
    smallest model that contains all its uses.

    Example:
      >>> import jax
      >>> from shardinit import deferred
      >>> model = [deferred.UninitializedParameter(jax.random.normal, "tied")]
      >>> [type(node).__name__ for node in deferred.mark_shareable(model)]
      ['ShareableUninitializedParameter']
    """
    refuse_others(submodel, DEFERRED, "mark_shareable")

    def mark(parameter: UninitializedParameter[Any]) -> Any:
        fields = parameter.attributes_dict()
        return ShareableUninitializedParameter.from_attributes(**fields)

    return select(submodel).at_instances_of(UninitializedParameter).apply(mark)


def attach_shared_parameters(
    submodel: M, *, strict: bool = True
) -> WithSharedParameters[M]:
    """Wraps a part of a model together with its shareable parameters.

    Args:
      submodel: the part that uses the parameters.
      strict: whether all uses of a name must have the same initializer (``==``); if
        not, the initializer of the first use is taken.

    Returns:
      A wrapper with one `UninitializedParameter` for each name, and ``submodel`` with a
      `SharedParameterLookup` at each use.

    Raises:
      SharedParameterError: two uses of a name differ in ``value_structure``, or, if
        ``strict``, in the initializer.

    Example:
      >>> import jax
      >>> from shardinit import deferred
      >>> tied = deferred.mark_shareable(
      ...     deferred.UninitializedParameter(jax.random.normal, "tied")
      ... )
      >>> model = deferred.attach_shared_parameters([tied, tied])
      >>> list(model.parameters)
      ['tied']
      >>> [type(use).__name__ for use in model.body]
      ['SharedParameterLookup', 'SharedParameterLookup']
    """
    refuse_others(submodel, DEFERRED, "attach_shared_parameters")
    uses = select(submodel).at_instances_of(ShareableUninitializedParameter)
    owned: dict[str, UninitializedParameter[Any]] = {}

    def where(number: int) -> str:
        path = path_str(uses.get_keypaths()[number])
        return f"shared parameter {uses.get_sequence()[number].name!r} at {path!r}"

    for number, use in enumerate(uses.get_sequence()):
        first = owned.get(use.name)
        if first is None:
            fields = use.attributes_dict()
            owned[use.name] = UninitializedParameter.from_attributes(**fields)
        elif first.value_structure != use.value_structure:
            raise SharedParameterError(
                where(number),
                f"this use has the structure {use.value_structure}",
                f"that of the first use, {first.value_structure}",
                "Give different parameters different names",
            )
        elif strict and first.initializer != use.initializer:
            raise SharedParameterError(
                where(number),
                "this use and the first have different initializers",
                "one parameter, marked once and used twice",
                "Give different parameters different names, or pass strict=False to "
                "take the first initializer",
            )
    body = uses.apply(lambda use: SharedParameterLookup(use.name, use.value_structure))
    # A new dict: to a type checker one of this kind of parameters is none of all kinds.
    return WithSharedParameters(body, {**owned})
