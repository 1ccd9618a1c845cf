"""Module: a class that looks mutable and is a pytree, initialised on first sight.

A module is written like any Python class and describes itself in ``__init__``. Values
come later, by ``init``, which gives a new module and runs, in this order:

1. every `Initializer` in a field: replaced by ``fn(next_key())``;
2. ``rng_init``: for values that need keys, or each other, but no input;
3. the forward call: ``if self.initializing():`` assigns what depends on the input.

Within a step fields go in alphabetical order. The forward call is traced for its shapes
and never executed.
"""

from __future__ import annotations

import functools
from abc import ABCMeta
from collections.abc import Callable
from dataclasses import MISSING, Field
from typing import TYPE_CHECKING, Any, ClassVar, Self

import jax
import numpy as np

from shardinit.core.jaxpr import is_key, is_tracer
from shardinit.errors import ModuleFieldError
from shardinit.module import context, filters, submodules, tabulate, walk
from shardinit.module import initialise as initialising
from shardinit.module.fields import FieldInfo, Parameter
from shardinit.module.walk import PRIVATE, ModuleNode


class ModuleMeta(ABCMeta):
    """Constructs modules: defaults, ``__init__``, the check that fields are set.

    Example:
      >>> from shardinit.module import Linear, ModuleMeta
      >>> isinstance(Linear, ModuleMeta)
      True
      >>> Linear(8).name
      'linear'
    """

    if not TYPE_CHECKING:  # a type checker shall see the signature of __init__

        def __call__(cls, *args, **kwargs):
            """Constructs a module, or meets it again in a compact method."""
            found = submodules.met_again(cls)
            if found is not None:
                return found
            module = cls.__new__(cls)
            now = context.scope()
            with context.entered(context.Scope(running=now.running, calls=now.calls)):
                module._set_defaults()
                module.__init__(*args, **kwargs)
            module._check_fields()
            if "name" not in vars(module):
                module.name = submodules.snake_case(cls.__name__)
            submodules.adopt(module)
            return module


class Module(ModuleNode, metaclass=ModuleMeta):
    """Base class of lazily initialised modules; see the module's docstring.

    Attributes:
      name: what a compact method calls the field it makes for this module; default
        the class's name in snake case.

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
        cls._fields = {**inherited, **declared}
        marked = {k for k, v in own.items() if getattr(v, "_is_compact", False)}
        cls._compact_methods = cls._compact_methods.difference(own) | marked
        if "__call__" in own:
            setattr(cls, "__call__", _entered(own["__call__"]))  # noqa: B010
        jax.tree_util.register_pytree_with_keys(
            cls, walk.flatten_with_keys, walk.unflattener(cls), walk.flatten
        )

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

        What is initialised already is left alone, so that ``init`` may be called again.
        Without inputs a module is marked initialised unless one of its own fields is
        still None or an `Initializer`, or a compact method has not run; such a one
        waits for an ``init`` with inputs.

        Args:
          key: an int seed or a key.
          inputs: example inputs, of which the shapes count: arrays or
            `jax.ShapeDtypeStruct`. A tuple is ``*args``, a dict ``**kwargs``,
            `Inputs(*args, **kwargs)` both, anything else one argument.
          call_method: the method that is given the inputs.
          inplace: change this module and return it.
          key_policy: ``"sequence"``, keys in the order in which they are asked for, or
            ``"name"``, keys derived from the path of the field or module that asks, so
            that renaming or adding one disturbs no other.
          mesh: devices to place the arrays on, every device making its own shard.
          rules: where each array lies (``AxisRules``, ``PathRules``, ``fsdp``).

        Raises:
          ModuleStateError: (a ``RuntimeError``) a key or a module was used where it
            may not be.
          ModuleFieldError: (a ``TypeError``) an array was assigned to a static field.
          InitFnError: a value cannot be made a function of the key alone.
          ShardingError: ``rules`` do not fit.
          TypeError: ``key`` is none.
        """
        return initialising.init(
            self, key, inputs, call_method, key_policy, inplace, mesh, rules
        )

    def rng_init(self) -> None:
        """Override to assign fields that need keys and no input."""

    def initializing(self) -> bool:
        """Whether this module is being initialised: True inside ``init``, else False.

        Raises:
          ModuleStateError: (a ``RuntimeError``) it is not initialised, and no ``init``
            of a tree that it is part of is under way.
        """
        return not self._initialized and context.initializing(self)

    @property
    def first_run(self) -> bool:
        """In a compact method: whether it makes its modules now."""
        return submodules.first_run(self)

    @property
    def initialized(self) -> bool:
        """Whether ``init`` has filled this module."""
        return self._initialized

    def field_axes(self) -> dict[str, tuple[str | None, ...] | None]:
        """Logical axis names of fields, by field; override where an instance decides.

        The default is what declarations say: ``Parameter.node(axes=("in", "out"))``.
        """
        return {k: f.metadata.get("axes") for k, f in self._fields.items()}

    # ---- modes -----------------------------------------------------------------------

    @property
    def training(self) -> bool:
        """Whether layers that behave differently in training do so."""
        return self._training

    @property
    def frozen(self) -> bool:
        """Whether the parameters of this module are not trained."""
        return self._frozen

    def train(self, mode: bool = True, *, inplace: bool = False) -> Self:
        """A copy with ``training`` set in every module."""
        return self._with("_training", mode, inplace)

    def eval(self, *, inplace: bool = False) -> Self:
        """A copy with ``training`` off in every module."""
        return self.train(False, inplace=inplace)

    def freeze(self, mode: bool = True, *, inplace: bool = False) -> Self:
        """A copy with ``frozen`` set in every module."""
        return self._with("_frozen", mode, inplace)

    def unfreeze(self, *, inplace: bool = False) -> Self:
        """A copy with ``frozen`` off in every module."""
        return self.freeze(False, inplace=inplace)

    def _with(self, flag: str, value: bool, inplace: bool) -> Self:
        root = self if inplace else self.copy()
        for _, module in walk.modules(root):
            module.__dict__[flag] = value
        return root

    # ---- parts -----------------------------------------------------------------------

    def copy(self) -> Self:
        """A copy of every module; arrays are shared, shared modules stay shared."""
        return walk.copy(self)[0]

    def filter(self, *filters_: filters.Filter) -> Self:
        """A copy that keeps the leaves which pass all filters, `Nothing` elsewhere.

        Args:
          *filters_: kinds, or predicates on `FieldInfo`.
        """
        return filters.filtered(self, filters_)

    def merge(self, other: Self, *rest: Self) -> Self:
        """A copy with the values of the others, of which the last one counts.

        What is not there (`Nothing`, None, an `Initializer`) overwrites nothing.

        Raises:
          ModuleFieldError: the modules do not match; with the path.
        """
        return filters.merged(self, (other, *rest), inplace=False)

    def update(self, other: Self, *rest: Self, inplace: bool = False) -> Self:
        """``merge``, or with ``inplace`` into this very module."""
        return filters.merged(self, (other, *rest), inplace=inplace)

    def parameters(self, *filters_: filters.Filter) -> Self:
        """``filter(Parameter)``."""
        return self.filter(Parameter, *filters_)

    def trainable_parameters(self, *filters_: filters.Filter) -> Self:
        """The parameters of modules that are not frozen."""

        def trained(field: FieldInfo) -> bool:
            return not field.module.frozen

        return self.filter(Parameter, trained, *filters_)

    # ---- looking at it ---------------------------------------------------------------

    def tabulate(self, inputs: Any = MISSING, *, depth: int = -1) -> str:
        """A table of the modules: shapes, bytes, kinds; allocates nothing.

        Args:
          inputs: as for ``init``; then the shapes of each module's inputs and outputs
            are shown, and what is not initialised is shown as it will be.
          depth: how many levels of submodules to show; -1 is all.
        """
        return tabulate.tabulate(self, inputs, depth)

    def __repr__(self) -> str:
        hidden = {*PRIVATE, "name"}
        shown = [f"{n}={_short(v)}" for n, v in vars(self).items() if n not in hidden]
        return f"{type(self).__name__}({', '.join(shown)})"


def _fields(cls: type) -> list[tuple[str, Field[Any]]]:
    return [(k, v) for k, v in vars(cls).get("_fields", {}).items()]


def _entered(method: Callable[..., Any]) -> Callable[..., Any]:
    """``__call__`` with its module known to what it calls."""

    @functools.wraps(method)
    def call(self: Module, *args: Any, **kwargs: Any) -> Any:
        with context.calling(self) as now:
            outputs = method(self, *args, **kwargs)
        if now.calls is not None:
            tabulate.record(now, self, args, kwargs, outputs)
        return outputs

    return call


def _short(value: Any) -> str:
    """A field's value on a line: small arrays by value, others by shape."""
    if not isinstance(value, (np.ndarray, jax.Array)):
        return repr(value)
    opaque = is_tracer(value) or is_key(value.dtype) or value.size > 4
    if opaque or not getattr(value, "is_fully_addressable", True):
        return f"{value.dtype}[{','.join(map(str, value.shape))}]"
    return f"array({np.array2string(np.asarray(value), separator=', ')})"
