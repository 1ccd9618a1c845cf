"""Keras 3 on its JAX backend: variables, each with a path and an initializer.

A Keras layer creates its variables when it is built, and each draws at once, from a
seed that Python's random state gave its initializer: no JAX key counts. Here variables
are created without a value (``keras.StatelessScope``), and the function of a key calls
each initializer with a key in the place of its seed. That key derives from the root key
and the variable's path alone, so that layers may be added and reordered and nobody else
notices. The seeds that layers such as dropout keep in variables derive likewise.

Names of layers are counted, ``dense``, ``dense_1``, for as long as a thread lives. A
model that a function builds is built in a thread of its own, so that it has the same
paths, and with them the same values, whatever was built before.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import reduce
from operator import getitem
from typing import Any

import jax
import jax.numpy as jnp

from shardinit.core.host_state import watched
from shardinit.core.init_fn import InitFn
from shardinit.core.ir.jaxpr import collector_paused
from shardinit.core.paths import nested
from shardinit.core.prng.names import check_unique, key_for_name
from shardinit.errors import (
    InitFnError,
    MissingFrameworkError,
    StructureMismatchError,
)
from shardinit.extras import needs

_OTHER_BACKENDS = ("tensorflow", "torch", "openvino")


def _wrong_backend(backend: str) -> MissingFrameworkError:
    return MissingFrameworkError(
        "the front end for keras",
        f"Keras runs on {backend}",
        "its JAX backend",
        "Set KERAS_BACKEND=jax in the environment before Keras is imported",
    )


try:
    with needs("keras", "keras"):
        import keras
except ModuleNotFoundError as error:
    if error.name in _OTHER_BACKENDS:
        raise _wrong_backend(error.name) from error
    raise


@dataclass(frozen=True)
class _Variable:
    """What is known of a variable before it has a value."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    initializer: Callable[..., Any]

    @property
    def seeded(self) -> bool:
        """Whether the initializer draws from a seed that a key can stand for."""
        return hasattr(self.initializer, "seed")

    @property
    def is_seed(self) -> bool:
        """Whether it is the state of a ``keras.random.SeedGenerator``."""
        return self.path.rpartition("/")[2] == "seed_generator_state"

    def draw(self, key: jax.Array) -> jax.Array:
        """Its value, from the root key."""
        key = key_for_name(key, self.path, wide=True)
        if self.is_seed:  # as Keras starts it: a seed, and a count
            return jnp.stack([jax.random.bits(key, dtype=self.dtype), jnp.uint32(0)])
        initializer: Any = self.initializer
        if self.seeded:
            # A copy: the key is a tracer, which would stay behind in the user's
            # initializer.
            initializer = copy.copy(initializer)
            initializer.seed = key
        try:
            value = initializer(self.shape, dtype=self.dtype)
        except ValueError as error:  # a draw without a seed is refused by Keras
            raise InitFnError(
                f"variable {self.path!r}",
                f"its initializer failed ({str(error).splitlines()[0]})",
                "an initializer of keras.initializers, or a function without draws",
            ) from error
        return jnp.asarray(keras.ops.convert_to_tensor(value, dtype=self.dtype))


def _built(model: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """A model whose variables have no values yet: built anew, names counted anew."""
    policy = keras.config.dtype_policy()

    def build() -> Any:
        keras.config.set_dtype_policy(policy)  # a thread begins with the default
        with keras.StatelessScope(initialize_variables=False):
            if not isinstance(model, keras.Layer):
                return model(*args, **kwargs)
            made = type(model).from_config(model.get_config())
            if not made.built:
                made.build_from_config(model.get_build_config())
            return made

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(build).result()


def _named(model: Any, built: Any) -> dict[str, Any]:
    """The variables by path: of the caller's own model, where there is one."""
    layer = model if isinstance(model, keras.Layer) else built
    if not isinstance(layer, keras.Layer) or not layer.variables:
        what = type(layer).__name__
        raise InitFnError(
            getattr(model, "__name__", type(model).__name__),
            f"{what} has no variables"
            if isinstance(layer, keras.Layer)
            else f"it returned {what}",
            "a layer or a model that is built",
            "Begin it with keras.Input(shape), or call its build(input_shape)",
        )
    paths = [variable.path for variable in layer.variables]
    check_unique(paths, lambda: paths)
    return dict(zip(paths, built.variables, strict=True))


def init_fn(model: Any, *args: Any, **kwargs: Any) -> InitFn:
    """Makes an `InitFn` of a Keras layer or model: its variables, drawn from a key.

    The function's result is the ``variables``, trainable or not, as dicts by the parts
    of their paths; `fill` puts them into a model. Keras itself ignores JAX keys, so the
    values are this function's own: each variable's initializer with the key that is
    derived from the root key and the variable's path. Seeds that were given to
    initializers and layers do not count.

    Args:
      model: a function that returns a built layer or model; or one itself, which is
        built anew from its config, and whose values are not looked at.
      *args: positional arguments of the function.
      **kwargs: keyword arguments of the function.

    Raises:
      MissingFrameworkError: Keras runs on another backend than JAX.
      InitFnError: the layer is not built, or an initializer draws without a seed.
      DuplicateNamesError: two variables have the same path.

    Example:
      >>> import keras
      >>> import shardinit
      >>> from shardinit.frontends import keras as frontend
      >>> def build():
      ...     return keras.Sequential([keras.Input((3,)), keras.layers.Dense(8)])
      >>> arrays = shardinit.init(frontend.init_fn(build), 42)
      >>> arrays["sequential"]["dense"]["kernel"].shape
      (3, 8)
      >>> frontend.fill(build, arrays).count_params()
      32
    """
    if keras.config.backend() != "jax":
        raise _wrong_backend(keras.config.backend())
    with collector_paused(), watched() as host:
        named = _named(model, _built(model, args, kwargs))
    # Keras has no public name for the initializer of a variable without a value
    variables = [
        _Variable(path, tuple(v.shape), v.dtype, v._initializer)
        for path, v in named.items()
    ]
    paths = [variable.path.split("/") for variable in variables]
    trained = [path.split("/") for path, v in named.items() if v.trainable]
    of_keras = all(
        isinstance(v.initializer, keras.Initializer) or v.is_seed for v in variables
    )

    def fn(key: jax.Array) -> dict[str, Any]:
        return nested(paths, [variable.draw(key) for variable in variables])

    def trainable(made: Any) -> dict[str, Any]:
        return nested(trained, [reduce(getitem, path, made) for path in trained])

    return InitFn(
        fn,
        trainable=trainable,
        name=getattr(model, "__name__", type(model).__name__),
        # default seeds come from Python's random state, and a key stands for them
        draws_on_host=host.moved and not of_keras,
        asks_process=host.asked,
        again=lambda: init_fn(model, *args, **kwargs),
    )


def fill(model: Any, arrays: Any, *args: Any, **kwargs: Any) -> Any:
    """A Keras model with these arrays in its variables, sharded as they are.

    Args:
      model: as for `init_fn`: a function builds a model, of which nothing is
        allocated; a layer or model itself is filled, and returned.
      arrays: what ``shardinit.init`` returned.
      *args: positional arguments of the function.
      **kwargs: keyword arguments of the function.

    Raises:
      StructureMismatchError: a variable has no array of its shape.

    Example:
      >>> import keras
      >>> import shardinit
      >>> from shardinit.frontends import keras as frontend
      >>> layer = keras.layers.Dense(8)
      >>> layer.build((None, 3))
      >>> arrays = shardinit.init(frontend.init_fn(layer), 42)
      >>> frontend.fill(layer, arrays).kernel.shape
      (3, 8)
    """
    is_layer = isinstance(model, keras.Layer)
    filled = model if is_layer else _built(model, args, kwargs)
    for path, variable in _named(model, filled).items():
        value = arrays
        for part in path.split("/"):
            value = value.get(part) if isinstance(value, dict) else None
        if getattr(value, "shape", None) != tuple(variable.shape):
            raise StructureMismatchError(
                f"variable {path!r}",
                f"got {getattr(value, 'shape', value)}",
                f"an array of shape {tuple(variable.shape)}",
            )
        variable.assign(value)
    return filled
