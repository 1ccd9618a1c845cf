"""Operations on whole models: renaming, checks and initialisation.

A layer names its own parameters, and the code that uses the layer adds a prefix. The
key of a parameter is derived from its name alone, so functions that initialise a model
check first that no two parameters have the same name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax

from shardinit.core.init_fn import InitFn
from shardinit.core.ir.jaxpr import collector_paused
from shardinit.core.prng import names
from shardinit.core.prng.root_key import as_single_key
from shardinit.core.systems import DEFERRED, is_other, refuse_others
from shardinit.deferred import structure
from shardinit.deferred.parameters import (
    FrozenParameter,
    Parameter,
    SupportsParameterRenaming,
    UninitializedParameter,
)
from shardinit.deferred.selection import select
from shardinit.errors import UninitializedParameterError

M = TypeVar("M")

_PARAMETERS = Parameter | FrozenParameter | UninitializedParameter


def _is_parameter(node: Any) -> bool:
    return isinstance(node, _PARAMETERS)


def _is_uninitialized(node: Any) -> bool:
    return isinstance(node, UninitializedParameter)


def rename_parameters(tree: M, rename_fn: Callable[[str], str]) -> M:
    """Returns a copy with ``rename_fn`` applied to every parameter name.

    Raises:
      InitFnError: (a ``TypeError``) the tree holds parameters of another library.

    Example:
      >>> from shardinit import deferred
      >>> tree = [deferred.Parameter(1.0, "scale")]
      >>> deferred.rename_parameters(tree, str.upper)
      [Parameter(value=1.0, name='SCALE')]
    """

    def named(node: Any) -> bool:
        return isinstance(node, SupportsParameterRenaming) or is_other(node, DEFERRED)

    def renamed(node: Any) -> Any:
        if not isinstance(node, SupportsParameterRenaming):
            refuse_others(tree, DEFERRED, "deferred model")
        return node.with_renamed_parameters(rename_fn)

    with collector_paused():
        return select(tree).at_subtrees_where(named).apply(renamed)


def add_parameter_prefix(prefix: str, tree: M, delimiter: str = ".") -> M:
    """Returns a copy whose parameters have ``prefix + delimiter`` before the name.

    Example:
      >>> from shardinit import deferred
      >>> deferred.add_parameter_prefix("mlp", deferred.Parameter(1.0, "scale"))
      Parameter(value=1.0, name='mlp.scale')
    """
    return rename_parameters(tree, lambda name: prefix + delimiter + name)


def check_no_duplicated_parameters(model: Any) -> None:
    """Raises if two parameters of a model, of any kind, have the same name.

    Raises:
      DuplicateNamesError: there are such parameters; it has their names and paths.
      InitFnError: (a ``TypeError``) the model holds parameters of another library.

    Example:
      >>> from shardinit import deferred
      >>> scale = deferred.Parameter(1.0, "scale")
      >>> deferred.check_no_duplicated_parameters([scale])
      >>> try:
      ...     deferred.check_no_duplicated_parameters([scale, scale])
      ... except deferred.DuplicateNamesError as error:
      ...     print(error.names, error.paths)
      ('scale',) ('0', '1')
    """
    refuse_others(model, DEFERRED, "deferred model")
    with collector_paused():
        found = select(model).at_instances_of(_PARAMETERS).get_sequence()
        names.check_unique(
            [parameter.name for parameter in found],
            lambda: names.paths_of(model, _is_parameter),
        )


def assert_no_uninitialized(model: Any) -> None:
    """Raises if a model contains uninitialised parameters.

    Raises:
      UninitializedParameterError: there are some; it has the first names and paths.
      InitFnError: (a ``TypeError``) the model holds parameters of another library.

    Example:
      >>> import jax
      >>> from shardinit import deferred
      >>> model = [deferred.UninitializedParameter(jax.random.normal, "bias")]
      >>> try:
      ...     deferred.assert_no_uninitialized(model)
      ... except deferred.UninitializedParameterError as error:
      ...     print(error.got)
      1 parameters have no value yet: 'bias' at '0'
    """
    refuse_others(model, DEFERRED, "deferred model")
    left = select(model).at_instances_of(UninitializedParameter).get_sequence()
    if left:
        paths = names.paths_of(model, _is_uninitialized)
        pairs = zip(left[:5], paths, strict=False)
        shown = ", ".join(f"{p.name!r} at {path!r}" for p, path in pairs)
        raise UninitializedParameterError(
            "",
            f"{len(left)} parameters have no value yet: {shown}"
            + (", …" if len(left) > 5 else ""),
            "a model whose parameters are all initialised",
            "Initialise them, or fill them from the checkpoint",
        )


def init_fn(tree: Any, *, wide_names: bool = False) -> InitFn:
    """Makes an `InitFn` of a model, or of one parameter, that is not initialised yet.

    ``shardinit.init(deferred.init_fn(model), key, mesh=mesh, rules=rules)`` returns the
    model with a sharded `Parameter` for each `UninitializedParameter`. All other nodes,
    such as initialised parameters, are returned unchanged and not moved. Leaf paths are
    those of the parameters in the model.

    This function itself traces nothing and allocates no arrays.

    Args:
      tree: the model.
      wide_names: whether to fold 128 bits of the hash of each name into the key
        instead of 32, for models in which two names have the same 32 bits. It changes
        all values.

    Raises:
      DuplicateNamesError: two parameters have the same name.
      NameClashError: two names would give the same key.
      InitFnError: (a ``TypeError``) the tree holds parameters of another library.

    Example:
      >>> import jax
      >>> import shardinit
      >>> from shardinit import deferred
      >>> model = {
      ...     "bias": deferred.UninitializedParameter(
      ...         lambda key: jax.random.normal(key, (4,)), "bias"
      ...     )
      ... }
      >>> shardinit.init(deferred.init_fn(model), 42)
      {'bias': Parameter(value=float32[4], name='bias')}
    """
    with collector_paused():
        check_no_duplicated_parameters(tree)
        return names.fill_slots(
            tree,
            is_slot=_is_uninitialized,
            name_of=lambda slot: slot.name,
            fill=lambda slot, key: slot.initialize(key),
            axes_of=_axes_of,
            wide_names=wide_names,
            name=type(tree).__name__,
        )


def _axes_of(slot: UninitializedParameter[Any]) -> Parameter[Any]:
    return Parameter(structure.axes_of(slot.value_structure), slot.name)


def initialize_parameters(
    model: M, prng_key: jax.Array, *, wide_names: bool = False
) -> M:
    """Returns a copy of ``model`` with every uninitialised parameter initialised.

    The parameters are initialised one after the other on the default device, with the
    same keys as by `init_fn`. The key of a parameter is ``fold_in(prng_key, h)``, where
    h is the first four bytes of the SHA-1 of its name, big-endian.

    Args:
      model: the model.
      prng_key: the key of the whole model, or an int seed.
      wide_names: see `init_fn`.

    Raises:
      TypeError: ``prng_key`` is neither a key nor an int.
      DuplicateNamesError: two parameters have the same name.
      NameClashError: two names would give the same key.
      StructureMismatchError: an initializer returned another structure than declared.

    Example:
      >>> import jax
      >>> from shardinit import deferred
      >>> model = [deferred.UninitializedParameter(jax.random.normal, "bias")]
      >>> deferred.initialize_parameters(model, jax.random.key(42))
      [Parameter(value=float32[], name='bias')]
    """
    return init_fn(model, wide_names=wide_names)(as_single_key(prng_key))
