"""The base class of modules: mutable in appearance, a pytree, initialised lazily.

The ``__init__`` of a module describes it. Values are assigned later by ``init``, which
returns a new module and runs these steps in order:

1. Each `Initializer` in a field is replaced by ``fn(next_key())``.
2. ``rng_init`` assigns values that need keys, or each other, but no input.
3. The forward call assigns, under ``if self.initializing():``, values that depend on
   the input.

Within a step, fields are processed in alphabetical order. The forward call is traced
for its shapes and never executed.
"""

from __future__ import annotations

import functools
from abc import ABCMeta
from collections.abc import Callable
from dataclasses import MISSING, Field
from typing import TYPE_CHECKING, Any, ClassVar, Self

import jax
import numpy as np

from shardinit.core.ir.jaxpr import is_key, is_tracer
from shardinit.errors import ModuleFieldError
from shardinit.module import context, filters, submodules, tabulate, walk
from shardinit.module import initialise as initialising
from shardinit.module.fields import FieldInfo, Parameter
from shardinit.module.walk import PRIVATE, ModuleNode


class ModuleMeta(ABCMeta):
    """Metaclass of modules: sets defaults, runs ``__init__``, checks the fields.

    Example:
      >>> from shardinit.module import Linear, ModuleMeta
      >>> isinstance(Linear, ModuleMeta)
      True
      >>> Linear(8).name
      'linear'
    """

    if not TYPE_CHECKING:  # a type checker shall see the signature of __init__

        def __call__(cls, *args, **kwargs):
            """Constructs a module; a compact method gets its existing one again."""
            found = submodules.met_again(cls)
            if found is not None:
                return found
            module = cls.__new__(cls)
            scope = context.current_scope()
            # An ``__init__`` gets neither keys nor the compact method around it: what
            # it constructs are fields of its own module.
            with context.entered(
                context.Scope(running=scope.running, calls=scope.calls)
            ):
                # Here and not in ``Module.__init__``, which a subclass need not call.
                module._set_defaults()
                module.__init__(*args, **kwargs)
            module._check_fields()
            if "name" not in vars(module):
                module.name = submodules.snake_case(cls.__name__)
            submodules.adopt(module)
            return module


class Module(ModuleNode, metaclass=ModuleMeta):
    """Base class of lazily initialised modules.

    Attributes:
      name: name of the field that a compact method makes for this module; by default
        the name of the class in snake case.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from shardinit.module import Module, Parameter, next_key
      >>> class Scale(Module):
      ...     factor: jax.Array | None = Parameter.node(None)
      ...
      ...     def __call__(self, x):
      ...         if self.initializing():
      ...             self.factor = jax.random.uniform(next_key(), x.shape[-1:])
      ...         return x * self.factor
      >>> scale = Scale().init(42, jnp.ones((2, 3)))
      >>> scale.initialized, scale.factor.shape
      (True, (3,))
    """

    name: str | None
    _compact_methods: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, name: str | None = None):
        """Gives the module a name; a subclass need not call this."""
        if name is not None:
            self.name = name

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        own = vars(cls)
        inherited = {k: f for c in reversed(cls.__mro__[1:]) for k, f in _fields(c)}
        declared = {k: v for k, v in own.items() if isinstance(v, Field)}
        for name in declared:
            _refuse_reserved(cls, name)
        cls._fields = {**inherited, **declared}
        marked = {k for k, v in own.items() if getattr(v, "_is_compact", False)}
        cls._compact_methods = cls._compact_methods.difference(own) | marked
        if "__call__" in own:
            setattr(cls, "__call__", _entered(own["__call__"]))  # noqa: B010
        # For each class anew: JAX looks a class up exactly, and the instances of a
        # subclass would be leaves.
        jax.tree_util.register_pytree_with_keys(
            cls, walk.flatten_with_keys, walk.unflattener(cls), walk.flatten
        )

    def __setattr__(self, name: str, value: Any) -> None:
        """Assigns a field; refuses the names of methods and of the module's state."""
        _refuse_reserved(type(self), name)
        object.__setattr__(self, name, value)

    def _set_defaults(self) -> None:
        for name, field in self._fields.items():
            if field.default is not MISSING:
                setattr(self, name, field.default)
            elif field.default_factory is not MISSING:
                setattr(self, name, field.default_factory())

    def _check_fields(self) -> None:
        for name in self._fields:
            if name not in vars(self):
                raise ModuleFieldError(
                    f"field {name!r} of {type(self).__name__}",
                    "__init__ left it without a value",
                    "a value for every declared field",
                    f"Assign self.{name} = None in __init__, or give the declaration "
                    "a default: .node(None)",
                )

    # ---- initialisation --------------------------------------------------------------

    def init(
        self,
        key: Any,
        inputs: Any = MISSING,
        call_method: str = "__call__",
        *,
        inplace: bool = False,
        key_policy: str = "sequence",
        mesh: Any = None,
        rules: Any = None,
    ) -> Self:
        """Returns a new module with all fields initialised.

        Initialised modules keep their values, so ``init`` may be called again. Without
        inputs, a module is marked initialised unless one of its own fields is still
        None or an `Initializer`, or one of its compact methods has not run. Call
        ``init`` again, with inputs, to initialise the rest.

        Args:
          key: an int seed or a key.
          inputs: example inputs, arrays or `jax.ShapeDtypeStruct`. A tuple is passed as
            ``*args``, a dict as ``**kwargs``, `Inputs` as both, anything else as one
            argument.
          call_method: the method that is called with the inputs.
          inplace: whether to change this module and return it.
          key_policy: ``"sequence"`` takes keys from one sequence, in the order of
            requests; ``"name"`` derives each key from the path of the field or module
            that it is for, so that renaming or adding one changes no other value.
          mesh: the devices to place the arrays on; each computes its own shards.
          rules: the sharding of each array (``AxisRules``, ``PathRules``, ``fsdp``).

        Raises:
          ModuleStateError: (a ``RuntimeError``) a key was requested, or a module was
            called, where that is not allowed.
          ModuleFieldError: (a ``TypeError``) an array was assigned to a static field.
          InitFnError: a value depends on more than the key.
          ShardingError: ``rules`` do not fit the arrays.
          TypeError: ``key`` is neither a key nor an int.

        Example:
          >>> import jax.numpy as jnp
          >>> from shardinit.module import Linear
          >>> Linear(8).init(42, jnp.ones((1, 3))).kernel.shape
          (3, 8)
        """
        return initialising.init(
            self, key, inputs, call_method, key_policy, inplace, mesh, rules
        )

    def rng_init(self) -> None:
        """Assigns fields that need keys but no input; override it in a subclass.

        Example:
          >>> import jax
          >>> from shardinit.module import Module, Parameter, next_key
          >>> class Scale(Module):
          ...     factor: jax.Array | None = Parameter.node(None)
          ...     def rng_init(self):
          ...         self.factor = jax.random.uniform(next_key(), (3,))
          >>> Scale().init(42).factor.shape
          (3,)
        """

    def initializing(self) -> bool:
        """Whether this module is being initialised by a running ``init``.

        Raises:
          ModuleStateError: (a ``RuntimeError``) the module is not initialised, and no
            ``init`` of a tree that contains it is running.

        Example:
          >>> from shardinit.module import Dropout
          >>> Dropout(0.5).init(42).initializing()
          False
        """
        return not self._initialized and context.initializing(self)

    @property
    def first_run(self) -> bool:
        """Whether the running compact method constructs its modules in this call."""
        return submodules.first_run(self)

    @property
    def initialized(self) -> bool:
        """Whether ``init`` has initialised this module."""
        return self._initialized

    def field_axes(self) -> dict[str, tuple[str | None, ...] | None]:
        """Logical axis names of the arrays, by field name.

        By default those of the declarations, ``Parameter.node(axes=("in", "out"))``.
        Override it if they differ between instances.

        Example:
          >>> from shardinit.module import Embed
          >>> Embed(10, 4).field_axes()
          {'embedding': None}
        """
        return {k: f.metadata.get("axes") for k, f in self._fields.items()}

    # ---- modes -----------------------------------------------------------------------

    @property
    def training(self) -> bool:
        """Whether the module is in training mode."""
        return self._training

    @property
    def frozen(self) -> bool:
        """Whether the parameters of this module are excluded from training."""
        return self._frozen

    def train(self, mode: bool = True, *, inplace: bool = False) -> Self:
        """Returns a copy with ``training`` set to ``mode`` in every module.

        Example:
          >>> from shardinit.module import Dropout
          >>> Dropout(0.5).eval().train().training
          True
        """
        return self._with("_training", mode, inplace)

    def eval(self, *, inplace: bool = False) -> Self:
        """Returns a copy with ``training`` set to False in every module.

        Example:
          >>> from shardinit.module import Dropout
          >>> Dropout(0.5).eval().training
          False
        """
        return self.train(False, inplace=inplace)

    def freeze(self, mode: bool = True, *, inplace: bool = False) -> Self:
        """Returns a copy with ``frozen`` set to ``mode`` in every module.

        Example:
          >>> from shardinit.module import Linear
          >>> Linear(8).freeze().frozen
          True
        """
        return self._with("_frozen", mode, inplace)

    def unfreeze(self, *, inplace: bool = False) -> Self:
        """Returns a copy with ``frozen`` set to False in every module.

        Example:
          >>> from shardinit.module import Linear
          >>> Linear(8).freeze().unfreeze().frozen
          False
        """
        return self.freeze(False, inplace=inplace)

    def _with(self, flag: str, value: bool, inplace: bool) -> Self:
        root = self if inplace else self.copy()
        for _, module in walk.modules(root):
            module.__dict__[flag] = value
        return root

    # ---- parts -----------------------------------------------------------------------

    def copy(self) -> Self:
        """Copies every module once; the copies share the arrays of the originals.

        Example:
          >>> import jax.numpy as jnp
          >>> from shardinit.module import Linear
          >>> model = Linear(8).init(42, jnp.ones((1, 3)))
          >>> model.copy().kernel is model.kernel
          True
        """
        return walk.copy(self)[0]

    def filter(self, *filters_: filters.Filter) -> Self:
        """Returns a copy with `Nothing` in place of leaves that fail a filter.

        Args:
          *filters_: kinds, or predicates on `FieldInfo`.

        Example:
          >>> import jax.numpy as jnp
          >>> from shardinit.module import BatchNorm, BatchStat
          >>> BatchNorm().init(42, jnp.ones((2, 3))).filter(BatchStat).scale
          Nothing
        """
        return filters.filtered(self, filters_)

    def merge(self, other: Self, *rest: Self) -> Self:
        """Returns a copy updated with the values of other modules, in order.

        An empty field (`Nothing`, None, an `Initializer`) does not replace a value.

        Raises:
          ModuleFieldError: the modules have different structures; it names the path.

        Example:
          >>> import jax.numpy as jnp
          >>> from shardinit.module import BatchNorm, BatchStat
          >>> norm = BatchNorm().init(42, jnp.ones((2, 3)))
          >>> norm.filter(BatchStat).merge(norm.parameters()).scale.shape
          (3,)
        """
        return filters.merged(self, (other, *rest), inplace=False)

    def update(self, other: Self, *rest: Self, inplace: bool = False) -> Self:
        """As ``merge``; with ``inplace``, this module is changed and returned.

        Example:
          >>> import jax
          >>> import jax.numpy as jnp
          >>> from shardinit.module import Linear
          >>> model = Linear(2).init(42, jnp.ones((1, 3)))
          >>> zeros = jax.tree.map(jnp.zeros_like, model.parameters())
          >>> float(model.update(zeros).kernel.sum())
          0.0
        """
        return filters.merged(self, (other, *rest), inplace=inplace)

    def parameters(self, *filters_: filters.Filter) -> Self:
        """Returns ``filter(Parameter, *filters_)``.

        Example:
          >>> import jax, jax.numpy as jnp
          >>> from shardinit.module import BatchNorm
          >>> norm = BatchNorm().init(42, jnp.ones((2, 3)))
          >>> len(jax.tree.leaves(norm)), len(jax.tree.leaves(norm.parameters()))
          (4, 2)
        """
        return self.filter(Parameter, *filters_)

    def trainable_parameters(self, *filters_: filters.Filter) -> Self:
        """Filters for the parameters of modules that are not frozen.

        Example:
          >>> import jax
          >>> import jax.numpy as jnp
          >>> from shardinit.module import Linear
          >>> frozen = Linear(2).init(42, jnp.ones((1, 3))).freeze()
          >>> jax.tree.leaves(frozen.trainable_parameters())
          []
        """

        def trained(field: FieldInfo) -> bool:
            return not field.module.frozen

        return self.filter(Parameter, trained, *filters_)

    # ---- looking at it ---------------------------------------------------------------

    def tabulate(self, inputs: Any = MISSING, *, depth: int = -1) -> str:
        """Returns a table of the modules with shapes, bytes and kinds of their leaves.

        No array is allocated.

        Args:
          inputs: as for ``init``. With them, the table has the shapes of the inputs and
            outputs of each module, and uninitialised modules as ``init`` would return
            them.
          depth: how many levels of submodules to show; -1 shows all.

        Example:
          >>> import jax.numpy as jnp
          >>> from shardinit.module import Linear
          >>> "kernel: float32[3,2]" in Linear(2).tabulate(jnp.ones((1, 3)))
          True
        """
        return tabulate.tabulate(self, inputs, depth)

    def __repr__(self) -> str:
        hidden = {*PRIVATE, "name"}
        shown = [f"{n}={_short(v)}" for n, v in vars(self).items() if n not in hidden]
        return f"{type(self).__name__}({', '.join(shown)})"


_RESERVED = {name for name in vars(Module) if not name.startswith("_")}
_RESERVED |= {*PRIVATE, "_fields", "_compact_methods"}


def _refuse_reserved(cls: type, name: str) -> None:
    if name in _RESERVED:
        raise ModuleFieldError(
            f"field {name!r} of {cls.__name__}",
            "every module has a method or an attribute of this name",
            "another name for the field",
        )


def _fields(cls: type) -> list[tuple[str, Field[Any]]]:
    return [(k, v) for k, v in vars(cls).get("_fields", {}).items()]


def _entered(method: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps ``__call__`` so that it runs in the scope of its module."""

    @functools.wraps(method)
    def call(self: Module, *args: Any, **kwargs: Any) -> Any:
        with context.calling(self) as scope:
            outputs = method(self, *args, **kwargs)
        if scope.calls is not None:
            tabulate.record(scope, self, args, kwargs, outputs)
        return outputs

    return call


def _short(value: Any) -> str:
    """The value of a field on one line: small arrays by value, others by shape."""
    if not isinstance(value, (np.ndarray, jax.Array)):
        return repr(value)
    opaque = is_tracer(value) or is_key(value.dtype) or value.size > 4
    # NumPy cannot have an array of which other processes hold shards.
    if opaque or not getattr(value, "is_fully_addressable", True):
        return f"{value.dtype}[{','.join(map(str, value.shape))}]"
    return f"array({np.array2string(np.asarray(value), separator=', ')})"
