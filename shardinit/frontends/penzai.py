"""Penzai: a model of uninitialised parameters is a tree of init functions already.

Penzai's V1 layers hold `UninitializedParameter`s, each an initializer and a name, and
its ``initialize_parameters`` draws them one after the other, every one in full on the
default device. The key of a parameter derives from its name, so nothing is lost when
they are drawn in another order, on other devices or alone: this front end finds them,
gives the engine their initializers, and puts a Penzai `Parameter` where each of them
was. Everything else of the model is not touched, shared parameters included: those are
owned once, by the handler that Penzai wraps around their uses.

The names of the dimensions are those of the named arrays that the initializers return.
"""

from __future__ import annotations

from typing import Any

import jax

from shardinit.core.init_fn import InitFn
from shardinit.core.ir.jaxpr import collector_paused
from shardinit.core.prng import names
from shardinit.core.systems import PENZAI, refuse_others
from shardinit.errors import StructureMismatchError
from shardinit.frontends import needs

with needs("penzai", "penzai"):
    from penzai.core import named_axes, shapecheck
    from penzai.deprecated.v1.nn import parameters

_PARAMETERS = (
    parameters.Parameter,
    parameters.FrozenParameter,
    parameters.UninitializedParameter,
)


def _is_parameter(node: Any) -> bool:
    return isinstance(node, _PARAMETERS)


def _is_slot(node: Any) -> bool:
    return isinstance(node, parameters.UninitializedParameter)


def _fill(slot: Any, key: jax.Array) -> Any:
    """What ``slot.initialize(key)`` returns, drawn once and checked."""
    value = slot.initializer(key)
    try:
        shapecheck.check_structure(value=value, pattern=slot.value_structure)
    except shapecheck.StructureMismatchError as error:
        raise StructureMismatchError(
            f"initializer of parameter {slot.name!r}",
            str(error),
            f"the parameter's own value_structure, {slot.value_structure}",
        ) from error
    return parameters.Parameter(value, slot.name)


def _names_of(array: Any) -> tuple[str | None, ...]:
    """A name, or None, for each dimension of the array inside a named array."""
    data = array.data_array
    if isinstance(array, named_axes.NamedArray):
        known = [str(name) for name in array.named_axes]
        return (*[None] * (len(data.shape) - len(known)), *known)
    places = {place: str(name) for name, place in array.data_axis_for_name.items()}
    return tuple(places.get(dim) for dim in range(len(data.shape)))


def _axes_of(slot: Any) -> Any:
    key = jax.eval_shape(jax.random.key, 0)
    value = jax.eval_shape(slot.initializer, key)

    def axes(node: Any) -> Any:
        if named_axes.is_namedarray(node):
            return jax.tree.map(lambda _: _names_of(node), node)
        return None

    value = jax.tree.map(axes, value, is_leaf=named_axes.is_namedarray)
    return parameters.Parameter(value, slot.name)


def init_fn(model: Any, *, wide_names: bool = False) -> InitFn:
    """Makes an `InitFn` of a Penzai V1 model that is not initialised yet.

    The function's result is the model with the values of its uninitialised parameters
    and nothing else; ``rebuild`` puts them into the model. The values are those of
    ``jax.jit(penzai.deprecated.v1.pz.nn.initialize_parameters)(model, key)``, bit for
    bit, except that for leaves narrower than 32 the last places may differ.

    Args:
      model: any pytree with V1 ``UninitializedParameter`` in it.
      wide_names: fold 128 bits of each name into the key instead of 32; the values are
        then no longer Penzai's.

    Raises:
      DuplicateNamesError: two parameters, initialised or not, have the same name.
      NameClashError: two names would give the same key.
      InitFnError: (a ``TypeError``) the model holds parameters of shardinit.deferred,
        or variables and slots of Penzai's second version.

    Example:
      >>> import jax
      >>> import shardinit
      >>> from penzai.deprecated.v1 import pz
      >>> from shardinit.frontends import penzai
      >>> model = [
      ...     pz.nn.UninitializedParameter(
      ...         lambda key: jax.random.normal(key, (4,)), "bias"
      ...     )
      ... ]
      >>> [bias] = shardinit.init(penzai.init_fn(model), 42)
      >>> bias.name, bias.value.shape
      ('bias', (4,))
    """
    refuse_others(model, PENZAI, "Penzai model")
    with collector_paused():
        found = jax.tree.leaves(model, is_leaf=_is_parameter)
        names.check_unique(
            [node.name for node in found if _is_parameter(node)],
            lambda: names.paths_of(model, _is_parameter),
        )
        return names.fill_slots(
            model,
            is_slot=_is_slot,
            name_of=lambda slot: slot.name,
            fill=_fill,
            axes_of=_axes_of,
            wide_names=wide_names,
            name=type(model).__name__,
        )
