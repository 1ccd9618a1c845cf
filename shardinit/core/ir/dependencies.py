"""Which values a leaf of an init function depends on, beside its key.

Lazily initialised modules are shown an input, of which an initialiser sees the shape
and hardly ever the values. Whether they matter is not guessed: the function is traced
with its inputs as arguments, and a leaf depends on those that the walk back from it
meets. An input that no leaf depends on need not exist.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from shardinit.core.ir import jaxpr as jx
from shardinit.core.ir.builder import Builder
from shardinit.core.ir.graph import Value, leaves, topological
from shardinit.core.paths import path_str
from shardinit.core.prng import derivation as keys
from shardinit.core.types import Tree, Values
from shardinit.errors import InitFnError


class Traced:
    """A function of a key and arrays, traced once; calls run what was traced.

    So the user's code runs once, however often the function is traced again.

    Args:
      fn: from a key and a list of arrays to a pytree of arrays.
      key: an abstract key, typed or raw.
      inputs: abstract arrays.
    """

    def __init__(
        self,
        fn: Callable[[Values, list[Values]], Tree],
        key: jx.Aval,
        inputs: Sequence[jx.Aval],
    ):
        self._key, self._inputs = key, inputs
        given = (key, list(inputs))
        with jx.collector_paused():
            self._closed, self._shapes = jx.without_mesh(
                lambda: jx.trace(lambda both: fn(*both), given)
            )

    def __call__(self, key: Values, values: Sequence[Values]) -> Tree:
        """Returns the pytree for a key and arrays, or tracers of them."""
        results = jx.run(*jx.opened(self._closed), [key, *values])
        return jax.tree.unflatten(jax.tree.structure(self._shapes), results)

    def dependencies(self) -> dict[int, str]:
        """The inputs that leaves depend on, each with the path of one such leaf.

        Raises:
          InitFnError: a leaf is a value of another trace, inside this one.
        """
        key = self._key
        derived = keys.root(jx.key_impl(key.dtype)) if jx.is_key(key.dtype) else None
        root = Value(key.shape, key.dtype, key=derived)
        values = [Value(x.shape, x.dtype) for x in self._inputs]
        opened = jx.opened(self._closed)
        with jx.collector_paused(), jx.no_mesh():
            outs = Builder(folds_keys=True, keeps_calls=False).read(
                *opened, [root, *values]
            )
        number_of = {value: number for number, value in enumerate(values)}
        found: dict[int, str] = {}
        paths = jax.tree_util.tree_leaves_with_path(self._shapes)
        for (path, _), out in zip(paths, outs, strict=True):
            _refuse_foreign(path_str(path), out)
            for value in leaves([out], ()):
                if value in number_of:
                    found.setdefault(number_of[value], path_str(path))
        return found


def _refuse_foreign(path: str, out: Value) -> None:
    read = [out, *(v for node in topological([out]) for v in node.inputs)]
    if any(jx.is_tracer(v.const) for v in read):
        raise InitFnError(
            f"leaf {path!r}",
            "it was made inside jax.jit, jax.checkpoint, jax.lax.scan or another "
            "transformation, and kept after that ended",
            "values made outside of transformations",
            "While self.initializing(), call submodules directly, and under the "
            "transformation otherwise",
        )


def stand_in(x: jx.Aval) -> jax.Array:
    """What enters a trace for an array of which nobody reads the values."""
    if not jx.is_key(x.dtype):
        return jnp.zeros(x.shape, x.dtype)
    key = jax.ShapeDtypeStruct(x.shape, x.dtype)
    words = jax.eval_shape(jax.random.key_data, key)
    zeros = jnp.zeros(words.shape, words.dtype)
    return jax.random.wrap_key_data(zeros, impl=jx.key_impl(x.dtype))


def off_devices(x: Values) -> Values:
    """An array without its devices, whose mesh may not be that of the trace."""
    if not jx.is_key(x.dtype):
        return np.asarray(x)
    words = jnp.asarray(np.asarray(jax.random.key_data(x)))
    return jax.random.wrap_key_data(words, impl=jx.key_impl(x.dtype))
