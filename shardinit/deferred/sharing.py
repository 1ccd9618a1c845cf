"""Sharing: one parameter, several uses, one copy in the tree.

A tree cannot say that two of its leaves are the same: copies of a tied embedding would
be drawn, stored and differentiated as two. So one node owns the parameter and the uses
look it up. While a model is built, the parameters that may be shared are marked
(`mark_shareable`) and used as often as needed; then `attach_shared_parameters` collects
them by name into one wrapper and leaves a lookup at every use. Before the model
computes, `resolved` puts the owned parameter back at every use, so that gradients with
respect to the wrapper add up.

Lookups are scoped like variables: the innermost wrapper that owns the name answers.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Generic, TypeVar

from shardinit.core.paths import path_str
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

    Sharing has to be asked for, so that two layers whose names are equal by accident
    are an error and not one layer. One that is never attached counts as an ordinary
    uninitialised parameter.

    Example:
      >>> import jax
      >>> from shardinit import deferred
      >>> tied = deferred.mark_shareable(
      ...     deferred.UninitializedParameter(jax.random.normal, "tied")
      ... )
      >>> type(tied).__name__
      'ShareableUninitializedParameter'
    """

    def treescope_color(self) -> str:
        """A stronger sand."""
        return "#d6a95c"


@pytree_dataclass
class SharedParameterLookup(Struct, Generic[T]):
    """A use of a parameter that a `WithSharedParameters` further out owns.

    Attributes:
      name: what the parameter was called when it was attached: its key in the wrapper.
      value_structure: of the parameter.

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
        """None of its own.

        Raises:
          MissingSharedParameterError: always; a resolved body has the parameter here.
        """
        raise MissingSharedParameterError(
            f"shared parameter {self.name!r}",
            "it was looked up outside the wrapper that owns it",
            "the parameter itself in this place",
            "Compute with wrapper.resolved(), not with wrapper.body; wrap with "
            "attach_shared_parameters what was not wrapped",
        )

    def treescope_color(self) -> str:
        """Lilac: it points elsewhere."""
        return "#cdb8e8"


@pytree_dataclass
class WithSharedParameters(Struct, Generic[M]):
    """A body whose shared parameters are owned here, once each.

    Attributes:
      body: what uses them, through lookups.
      parameters: the owned parameters by the names that the lookups have. An outer
        prefix renames the parameters; the keys stay.

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
        """The body with the owned parameter, initialised or traced, at every use."""
        return _resolve(self.body, self.parameters)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the resolved body."""
        body: Any = self.resolved()
        return body(*args, **kwargs)

    def treescope_color(self) -> str:
        """Violet."""
        return "#b39ddb"


def _resolve(tree: Any, owned: dict[str, AnyParameter]) -> Any:
    def put(node: Any) -> Any:
        if isinstance(node, WithSharedParameters):
            return _resolve(node.body, {**owned, **node.parameters})
        return owned.get(node.name, node)

    inner = SharedParameterLookup | WithSharedParameters
    return select(tree).at_instances_of(inner).apply(put)


def mark_shareable(submodel: M) -> M:
    """Marks every uninitialised parameter of a part of a model as one to be shared.

    The part may then be used several times. Whoever marks also wraps everything that
    uses it, once, with `attach_shared_parameters`.

    Example:
      >>> import jax
      >>> from shardinit import deferred
      >>> model = [deferred.UninitializedParameter(jax.random.normal, "tied")]
      >>> [type(node).__name__ for node in deferred.mark_shareable(model)]
      ['ShareableUninitializedParameter']
    """

    def mark(parameter: UninitializedParameter[Any]) -> Any:
        fields = parameter.attributes_dict()
        return ShareableUninitializedParameter.from_attributes(**fields)

    return select(submodel).at_instances_of(UninitializedParameter).apply(mark)


def attach_shared_parameters(
    submodel: M, *, strict: bool = True
) -> WithSharedParameters[M]:
    """Takes ownership of the shareable parameters in a part of a model.

    Args:
      submodel: what uses them.
      strict: whether all uses of a name must have the same initializer (``==``); if
        not, the first one counts.

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
    return WithSharedParameters(body, {**owned})
