"""The decorator of pytree dataclasses: frozen dataclasses registered as pytree nodes.

The decorator refuses two things that a dataclass does silently. A dataclass inherits
the fields of its parents without listing them, so the order of the children is written
nowhere. And it generates an ``__init__`` that overrides a hand-written one of a parent,
together with the checks in it. Both need an argument of the decorator.

A hand-written ``__init__`` may assign fields although the class is frozen. It runs on
an instance of a mutable subclass, the stand-in, and the fields are then copied to the
real object.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import operator
import typing
from collections.abc import Callable
from typing import Any, Literal, TypeVar, overload

import jax

from shardinit.errors import PyTreeDataclassSafetyError

C = TypeVar("C", bound=type)

_INFO = "__shardinit_pytree_dataclass__"  # in the __dict__ of a decorated class
_STAND_IN = "__shardinit_stand_in_for__"  # in the __dict__ of its mutable subclass


def is_pytree_dataclass_type(cls: Any) -> bool:
    """Whether the class itself, not a parent of it, was decorated.

    Example:
      >>> from shardinit import deferred
      >>> deferred.is_pytree_dataclass_type(deferred.Parameter)
      True
      >>> deferred.is_pytree_dataclass_type(deferred.Struct)
      False
    """
    return isinstance(cls, type) and _INFO in cls.__dict__


def is_pytree_node_field(field: dataclasses.Field[Any]) -> bool:
    """Whether a field is a child; ``metadata={"pytree_node": False}`` is static.

    Example:
      >>> import dataclasses
      >>> from shardinit import deferred
      >>> fields = dataclasses.fields(deferred.Parameter)
      >>> {field.name: deferred.is_pytree_node_field(field) for field in fields}
      {'value': True, 'name': False}
    """
    return field.metadata.get("pytree_node", True)


@overload
def pytree_dataclass(cls: C, /) -> C: ...


@overload
def pytree_dataclass(
    cls: None = None,
    /,
    *,
    has_implicitly_inherited_fields: bool = False,
    use_mutable_proxy_in_init: bool = True,
    overwrite_parent_init: bool = False,
    init: bool = True,
    repr: bool | Literal["auto"] = "auto",
    eq: bool = True,
    order: bool = False,
    match_args: bool = False,
    kw_only: bool = False,
) -> Callable[[C], C]: ...


# Not frozen_default=True: a type checker would then refuse assignments in __init__ too.
@typing.dataclass_transform(field_specifiers=(dataclasses.field,))
def pytree_dataclass(
    cls: Any = None,
    /,
    *,
    has_implicitly_inherited_fields: bool = False,
    use_mutable_proxy_in_init: bool = True,
    overwrite_parent_init: bool = False,
    init: bool = True,
    repr: bool | Literal["auto"] = "auto",
    eq: bool = True,
    order: bool = False,
    match_args: bool = False,
    kw_only: bool = False,
) -> Any:
    """Makes a class a frozen dataclass and registers it as a pytree node.

    Args:
      cls: the class. Without it, a decorator with the other arguments is returned.
      has_implicitly_inherited_fields: whether the class inherits fields that it does
        not list. By default a class lists all its fields, in their order.
      use_mutable_proxy_in_init: whether a hand-written ``__init__`` runs on a mutable
        stand-in, so that it may assign fields.
      overwrite_parent_init: whether the generated ``__init__`` may replace a
        hand-written one of a parent.
      init: whether to generate ``__init__`` if the class itself has none.
      repr: whether to generate ``__repr__``; ``"auto"`` generates it unless the class
        is a `Struct`, which has its own.
      eq: as for ``dataclasses.dataclass``.
      order: as for ``dataclasses.dataclass``.
      match_args: as for ``dataclasses.dataclass``.
      kw_only: as for ``dataclasses.dataclass``.

    Raises:
      PyTreeDataclassSafetyError: the class inherits fields that it does not list, or
        would override a hand-written ``__init__`` of a parent, and no argument allows
        that.
      ValueError: the class is decorated already.
      TypeError: the class is not a `Struct` and lacks ``tree_unflatten``, or both
        ``tree_flatten`` and ``tree_flatten_with_keys``.

    Example:
      >>> import dataclasses
      >>> import jax
      >>> from shardinit import deferred
      >>> @deferred.pytree_dataclass
      ... class Scale(deferred.Struct):
      ...     factor: float
      ...     axis: str = dataclasses.field(metadata={"pytree_node": False})
      >>> jax.tree.map(lambda x: 2 * x, Scale(1.5, "embed"))
      Scale(factor=3.0, axis='embed')
    """
    options = {"init": init, "eq": eq, "order": order, "match_args": match_args}
    options["kw_only"] = kw_only

    def decorate(cls: Any) -> Any:
        if is_pytree_dataclass_type(cls):
            raise ValueError(f"{cls.__name__} is a pytree dataclass already")
        _check_flattens(cls)
        # Asked before `dataclass` below, which puts a generated one there.
        written = cls.__dict__.get("__init__")
        generates = init and written is None
        if generates and not overwrite_parent_init:
            _keep_parent_init(cls)
        hashes = eq and _hashes_by_structure(cls)
        wanted = not _is_struct(cls) if repr == "auto" else repr
        cls = dataclasses.dataclass(frozen=True, repr=wanted, **options)(cls)
        setattr(cls, _INFO, cls.__init__ if generates else None)
        if hashes:
            # The one that `dataclass` makes fails on a field that holds a dict or a
            # list.
            cls.__hash__ = cls._structural_hash
        _check_fields(cls, has_implicitly_inherited_fields)
        _register(cls)
        if written is not None and use_mutable_proxy_in_init:
            cls.__init__ = _on_stand_in(written)
        return cls

    return decorate if cls is None else decorate(cls)


_FLATTEN, _FLATTEN_WITH_KEYS = "tree_flatten", "tree_flatten_with_keys"


def _is_struct(cls: Any) -> bool:
    return hasattr(cls, "from_attributes")


def _hashes_by_structure(cls: Any) -> bool:
    """Whether a class hashes as Structs do: it has no ``__hash__`` of its own."""
    return _is_struct(cls) and cls.__dict__.get("__hash__") is None


def _check_flattens(cls: Any) -> None:
    flattens = _defined(cls, _FLATTEN) or _defined(cls, _FLATTEN_WITH_KEYS)
    if not (flattens and hasattr(cls, "tree_unflatten")):
        raise TypeError(
            f"{cls.__name__} has no {_FLATTEN} (or {_FLATTEN_WITH_KEYS}) and "
            f"tree_unflatten; inherit from deferred.Struct, which has them"
        )


def _defined(cls: Any, method: str) -> int:
    """How near to ``cls`` a method is defined; more is nearer, 0 is nowhere."""
    heights = range(len(cls.__mro__), 0, -1)
    classes = zip(heights, cls.__mro__, strict=True)
    return next((height for height, c in classes if method in vars(c)), 0)


def _register(cls: Any) -> None:
    """Registers a class by the one of its two flatten methods that is its own."""
    plain, keyed = _defined(cls, _FLATTEN), _defined(cls, _FLATTEN_WITH_KEYS)
    if plain > keyed:  # keys that a parent gives would be those of other children
        jax.tree_util.register_pytree_node_class(cls)
    elif keyed > plain:
        with_keys = operator.methodcaller(_FLATTEN_WITH_KEYS)
        jax.tree_util.register_pytree_with_keys(cls, with_keys, cls.tree_unflatten)
    else:
        jax.tree_util.register_pytree_with_keys_class(cls)


def _keep_parent_init(cls: Any) -> None:
    inits = [
        vars(c)["__init__"]
        for c in cls.__mro__
        if "__init__" in vars(c) and not getattr(c, "_is_protocol", False)
    ]  # that of a Protocol was written by typing
    inherited = inits[0]
    generated = getattr(cls, _INFO, None) or object.__init__
    if inherited is not generated:
        raise PyTreeDataclassSafetyError(
            cls.__qualname__,
            f"a generated __init__ would overwrite {inherited.__qualname__}, which was "
            f"written by hand",
            "one of the two to be chosen",
            "Pass overwrite_parent_init=True for the generated one, init=False for the "
            "inherited one, or write __init__",
        )


def _check_fields(cls: Any, may_inherit: bool) -> None:
    actual = [field.name for field in dataclasses.fields(cls)]
    listed = [name for name in inspect.get_annotations(cls) if name in set(actual)]
    if may_inherit:
        if set(listed) == set(actual):
            raise PyTreeDataclassSafetyError(
                cls.__qualname__,
                "it inherits no field that it does not list",
                "such a field, as has_implicitly_inherited_fields=True says so",
                "Leave the argument out",
            )
    elif listed != actual:
        raise PyTreeDataclassSafetyError(
            cls.__qualname__,
            f"it lists the fields {listed}",
            f"all its fields in the order of the dataclass, {actual}",
            "List them, or pass has_implicitly_inherited_fields=True",
        )


@functools.cache
def _stand_in(cls: Any) -> Any:
    """Makes a mutable subclass that is neither a dataclass nor a pytree node."""
    members = {
        "__setattr__": object.__setattr__,
        "__delattr__": object.__delattr__,
        "__hash__": None,
        "__qualname__": f"{cls.__qualname__} (in __init__)",
        "__module__": cls.__module__,
        _STAND_IN: cls,
    }
    return type(cls)(f"{cls.__name__}InInit", (cls,), members)


def _on_stand_in(written: Any) -> Any:
    @functools.wraps(written)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        cls = type(self)
        if _STAND_IN in cls.__dict__:  # called by the __init__ of a subclass
            written(self, *args, **kwargs)
            return
        stand_in = object.__new__(_stand_in(cls))
        written(stand_in, *args, **kwargs)
        for field in dataclasses.fields(cls):
            try:
                value = getattr(stand_in, field.name)
            except AttributeError as error:
                raise AttributeError(
                    f"{cls.__qualname__}.__init__ left the field {field.name!r} unset"
                ) from error
            object.__setattr__(self, field.name, value)

    return __init__
