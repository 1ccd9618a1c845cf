"""Deferred parameters: a model is built first and initialised later, sharded.

Model-building code makes an `UninitializedParameter`, with an initializer and a name,
for each array of its nested `Struct`. `init_fn` turns such a model into an init
function whose result, through ``shardinit.init``, is the same model with each
`Parameter` sharded.

The names, arguments, defaults and values are those of Penzai's parameters.

Example:
  >>> import jax, shardinit
  >>> from shardinit import deferred
  >>> draw = lambda key: jax.random.normal(key, (8, 32))
  >>> model = {"w": deferred.UninitializedParameter(draw, "w")}
  >>> shardinit.init(deferred.init_fn(model), 42)["w"].value.shape
  (8, 32)
"""

from shardinit.core.prng.names import key_for_name as key_for_name
from shardinit.deferred.cutting import NotInThisPartition as NotInThisPartition
from shardinit.deferred.cutting import combine as combine
from shardinit.deferred.dataclass import (
    is_pytree_dataclass_type as is_pytree_dataclass_type,
)
from shardinit.deferred.dataclass import is_pytree_node_field as is_pytree_node_field
from shardinit.deferred.dataclass import pytree_dataclass as pytree_dataclass
from shardinit.deferred.models import add_parameter_prefix as add_parameter_prefix
from shardinit.deferred.models import assert_no_uninitialized as assert_no_uninitialized
from shardinit.deferred.models import (
    check_no_duplicated_parameters as check_no_duplicated_parameters,
)
from shardinit.deferred.models import init_fn as init_fn
from shardinit.deferred.models import initialize_parameters as initialize_parameters
from shardinit.deferred.models import rename_parameters as rename_parameters
from shardinit.deferred.parameters import FrozenParameter as FrozenParameter
from shardinit.deferred.parameters import Parameter as Parameter
from shardinit.deferred.parameters import ParameterLike as ParameterLike
from shardinit.deferred.parameters import (
    SupportsParameterRenaming as SupportsParameterRenaming,
)
from shardinit.deferred.parameters import (
    UninitializedParameter as UninitializedParameter,
)
from shardinit.deferred.selection import Selection as Selection
from shardinit.deferred.selection import select as select
from shardinit.deferred.sharing import (
    ShareableUninitializedParameter as ShareableUninitializedParameter,
)
from shardinit.deferred.sharing import SharedParameterLookup as SharedParameterLookup
from shardinit.deferred.sharing import WithSharedParameters as WithSharedParameters
from shardinit.deferred.sharing import (
    attach_shared_parameters as attach_shared_parameters,
)
from shardinit.deferred.sharing import mark_shareable as mark_shareable
from shardinit.deferred.struct import Struct as Struct
from shardinit.deferred.structure import AbstractArray as AbstractArray
from shardinit.deferred.structure import with_axes as with_axes
from shardinit.errors import DuplicateNamesError as DuplicateNamesError
from shardinit.errors import MissingSharedParameterError as MissingSharedParameterError
from shardinit.errors import NameClashError as NameClashError
from shardinit.errors import PyTreeDataclassSafetyError as PyTreeDataclassSafetyError
from shardinit.errors import SelectionError as SelectionError
from shardinit.errors import SharedParameterError as SharedParameterError
from shardinit.errors import StructureMismatchError as StructureMismatchError
from shardinit.errors import UninitializedParameterError as UninitializedParameterError
