"""Deferred parameters: a model is built first and initialised later, sharded.

Model-building code makes `UninitializedParameter`s, each with an initializer and a
name, inside `Struct`s. `init_fn` turns such a model into an init function whose result,
through ``shardinit.init``, is the same model with sharded `Parameter`s.

The names, arguments, defaults and values are those of Penzai's parameters.

Example:
  >>> import jax, shardinit
  >>> from shardinit import deferred
  >>> draw = lambda key: jax.random.normal(key, (8, 32))
  >>> model = {"w": deferred.UninitializedParameter(draw, "w")}
  >>> shardinit.init(deferred.init_fn(model), 42)["w"].value.shape
  (8, 32)
"""

from shardinit.core.prng.names import key_for as key_for_name
from shardinit.deferred.cutting import NotInThisPartition, combine
from shardinit.deferred.dataclass import (
    is_pytree_dataclass_type,
    is_pytree_node_field,
    pytree_dataclass,
)
from shardinit.deferred.models import (
    add_parameter_prefix,
    assert_no_uninitialized,
    check_no_duplicated_parameters,
    init_fn,
    initialize_parameters,
    rename_parameters,
)
from shardinit.deferred.parameters import (
    FrozenParameter,
    Parameter,
    ParameterLike,
    SupportsParameterRenaming,
    UninitializedParameter,
)
from shardinit.deferred.selection import Selection, select
from shardinit.deferred.sharing import (
    ShareableUninitializedParameter,
    SharedParameterLookup,
    WithSharedParameters,
    attach_shared_parameters,
    mark_shareable,
)
from shardinit.deferred.struct import Struct
from shardinit.deferred.structure import AbstractArray, with_axes
from shardinit.errors import (
    DuplicateNamesError,
    MissingSharedParameterError,
    NameClashError,
    PyTreeDataclassSafetyError,
    SelectionError,
    SharedParameterError,
    StructureMismatchError,
    UninitializedParameterError,
)

__all__ = [
    "AbstractArray",
    "DuplicateNamesError",
    "FrozenParameter",
    "MissingSharedParameterError",
    "NameClashError",
    "NotInThisPartition",
    "Parameter",
    "ParameterLike",
    "PyTreeDataclassSafetyError",
    "Selection",
    "SelectionError",
    "ShareableUninitializedParameter",
    "SharedParameterError",
    "SharedParameterLookup",
    "Struct",
    "StructureMismatchError",
    "SupportsParameterRenaming",
    "UninitializedParameter",
    "UninitializedParameterError",
    "WithSharedParameters",
    "add_parameter_prefix",
    "assert_no_uninitialized",
    "attach_shared_parameters",
    "check_no_duplicated_parameters",
    "combine",
    "init_fn",
    "initialize_parameters",
    "is_pytree_dataclass_type",
    "is_pytree_node_field",
    "key_for_name",
    "mark_shareable",
    "pytree_dataclass",
    "rename_parameters",
    "select",
    "with_axes",
]
