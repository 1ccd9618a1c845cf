"""Penzai, both versions of it: keys derive from names, and axes have names.

A model of the first version holds `UninitializedParameter`s, each an initializer and
a name, and its ``initialize_parameters`` draws them one after the other, every one in
full on the default device. Here they are found, the engine gets their initializers, and
a Penzai `Parameter` takes the place of each. Everything else of the model is not
touched, shared parameters included: those are owned once, by the handler that Penzai
wraps around their uses.

A model of the second version draws its parameters while it is built, by a function
that takes ``init_base_rng``. Its variables are unbound, which leaves their slots in the
model, and ``rebuild`` binds new ones: what the model shares by label stays shared.

The key of a parameter derives from its name, so nothing is lost when they are drawn in
another order, on other devices or alone. The names of the dimensions are those of the
named arrays that the initializers return.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax

from shardinit.core.cut.trace import trace
from shardinit.core.host_state import watched
from shardinit.core.init_fn import InitFn, check_structure
from shardinit.core.ir.jaxpr import collector_paused
from shardinit.core.paths import keys_of, nested, path_str
from shardinit.core.prng import names
from shardinit.core.systems import PENZAI, refuse_others
from shardinit.errors import StructureMismatchError
from shardinit.extras import needs

with needs("penzai", "penzai"):
    from penzai.core import named_axes, shapecheck, variables
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


@dataclasses.dataclass
class _Unbound:
    """A model of the second version taken apart, and put together again.

    Attributes:
      model: with slots for its variables, and holes for arrays that are none of them.
      arrays: the places of those holes among the model's leaves.
      frozen: the variables; values: what they hold.
      paths: of all arrays, those of variables first: by label, or by place.
    """

    model: Any
    arrays: dict[int, Any]
    frozen: list[Any]
    paths: list[list[str]]

    @classmethod
    def of(cls, built: Any) -> _Unbound:
        """Takes a model apart."""
        slots, found = variables.unbind_variables(built, freeze=True)
        frozen: list[Any] = list(found)
        pairs, structure = jax.tree_util.tree_flatten_with_path(slots)
        arrays = {i: x for i, (_, x) in enumerate(pairs) if isinstance(x, jax.Array)}
        holes = [None if i in arrays else x for i, (_, x) in enumerate(pairs)]
        paths = [
            [*_label(variable, number).split("/"), *inner]
            for number, variable in enumerate(frozen)
            for inner in _inside(variable.value)
        ]
        paths += [keys_of(path_str(pairs[i][0])) for i in arrays]
        return cls((structure, holes), arrays, frozen, paths)

    def leaves(self) -> list[Any]:
        """All arrays, in the order of their paths."""
        return [*jax.tree.leaves([x.value for x in self.frozen]), *self.arrays.values()]

    def axes(self) -> Iterator[tuple[str | None, ...] | None]:
        """The names of the dimensions of each array."""
        for node in jax.tree.leaves(
            ([x.value for x in self.frozen], list(self.arrays.values())),
            is_leaf=named_axes.is_namedarray,
        ):
            yield _names_of(node) if named_axes.is_namedarray(node) else None

    def described(self) -> _Unbound:
        """The same without the arrays."""
        frozen = [
            (jax.tree.structure(x.value), dataclasses.replace(x, value=None))
            for x in self.frozen
        ]
        return dataclasses.replace(
            self, frozen=frozen, arrays=dict.fromkeys(self.arrays)
        )

    def bound(self, leaves: list[Any]) -> Any:
        """The model with these arrays; of what `described` returned."""
        rest = iter(leaves)
        made = []
        for structure, variable in self.frozen:
            own = [next(rest) for _ in range(structure.num_leaves)]
            value = structure.unflatten(own)
            made.append(dataclasses.replace(variable, value=value).unfreeze_as_copy())
        structure, holes = self.model
        filled = [next(rest) if i in self.arrays else x for i, x in enumerate(holes)]
        return variables.bind_variables(structure.unflatten(filled), made)


def _label(variable: Any, number: int) -> str:
    """The label of a variable; labels that are made up for state are numbered."""
    label = variable.label
    return label if isinstance(label, str) else f"state_{number}"


def _inside(value: Any) -> list[list[str]]:
    """The paths of the arrays in the value of a variable; a named array is one."""
    pairs = jax.tree_util.tree_leaves_with_path(value, is_leaf=named_axes.is_namedarray)
    return [keys_of(path_str(path)) if path else [] for path, _ in pairs]


def _of_builder(build: Callable[..., Any], args: tuple, kwargs: dict) -> InitFn:
    """The init function of a function that builds a model of the second version."""
    name = getattr(build, "__qualname__", type(build).__name__)
    found: dict[str, Any] = {}

    def fn(key: jax.Array) -> dict[str, Any]:
        unbound = _Unbound.of(build(*args, init_base_rng=key, **kwargs))
        if not found:  # the first trace, whose result JAX keeps for the traces to come
            # Without the arrays, which are tracers here and must not outlive the trace.
            found["model"] = unbound.described()
            found["axes"] = nested(unbound.paths, unbound.axes())
        return nested(unbound.paths, unbound.leaves())

    with collector_paused(), watched() as host:
        _, shapes = trace(fn, jax.eval_shape(jax.random.key, 0))
    model, structure = found["model"], jax.tree.structure(shapes)

    def rebuild(arrays: Any) -> Any:
        check_structure(arrays, structure, name)
        return model.bound([_at(arrays, path) for path in model.paths])

    return InitFn(
        fn,
        axes=found["axes"],
        rebuild=rebuild,
        state_of=_state_of,
        trainable=lambda made: variables.unbind_params(made, freeze=True)[1],
        name=name,
        draws_on_host=host.moved,
        asks_process=host.asked,
        again=lambda: _of_builder(build, args, kwargs),
    )


def _at(tree: Any, path: list[str]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _state_of(tree: Any) -> Any:
    """The arrays of a model of the second version; other trees as they are."""
    leaves = jax.tree.leaves(tree)
    if not any(isinstance(leaf, variables.AbstractVariable) for leaf in leaves):
        return tree
    unbound = _Unbound.of(tree)
    return nested(unbound.paths, unbound.leaves())


def init_fn(model: Any, *args: Any, wide_names: bool = False, **kwargs: Any) -> InitFn:
    """Makes an `InitFn` of what builds a Penzai model, or of a model of version one.

    Of a function that builds a model the result is the values of its variables, as
    dicts by the parts of their labels; ``rebuild`` gives the model with variables of
    these values. The values are those of
    ``jax.jit`` of ``model(*args, init_base_rng=key, **kwargs)``, its variables frozen.

    Of a V1 model that is not initialised yet the result is the model with the values of
    its uninitialised parameters and nothing else; ``rebuild`` puts them into the model.
    The values are those of
    ``jax.jit(penzai.deprecated.v1.pz.nn.initialize_parameters)(model, key)``.

    Either are equal bit for bit, except that for leaves narrower than 32 the last
    places may differ.

    Args:
      model: a function that takes ``init_base_rng`` and returns a model, such as
        ``MLP.from_config``; or any pytree with V1 ``UninitializedParameter`` in it.
      *args: positional arguments of the function.
      wide_names: for V1 models: fold 128 bits of each name into the key instead of 32;
        the values are then no longer Penzai's.
      **kwargs: keyword arguments of the function.

    Raises:
      DuplicateNamesError: two V1 parameters, initialised or not, have the same name.
      NameClashError: two names would give the same key.
      InitFnError: (a ``TypeError``) the model holds parameters of shardinit.deferred,
        or is a model of Penzai's second version itself: its slots have no initializers.

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
      >>> from penzai.models import simple_mlp
      >>> build = simple_mlp.MLP.from_config
      >>> mlp = shardinit.init(penzai.init_fn(build, feature_sizes=[3, 8]), 42)
      >>> mlp.sublayers[0].sublayers[0].weights.value.named_shape
      {'features': 3, 'features_out': 8}
    """
    if callable(model) and jax.tree.leaves(model) == [model]:
        return _of_builder(model, args, kwargs)
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
