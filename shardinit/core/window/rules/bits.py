"""Sources: where elements come from, random bits above all."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from jax import lax

from shardinit.core.ir import jaxpr as jx
from shardinit.core.ir.graph import Node, Value
from shardinit.core.prng import threefry
from shardinit.core.prng.derivation import THREEFRY
from shardinit.core.types import Coords, Dim, Elements, Values
from shardinit.core.window.coordinates import is_one, ravel, ravel_wide, spread
from shardinit.core.window.reasons import require
from shardinit.core.window.rules.elementwise import require_plain, same_place
from shardinit.core.window.rules.rule import At, Steps, rule


@rule("iota", exact=True)
def _iota(node: Node, which: int, coords: Coords) -> Steps:
    coord = coords[node.params["dimension"]]
    return lax.convert_element_type(coord, node.params["dtype"])
    yield  # a generator that asks for nothing


@rule("random_bits")
def _random_bits(node: Node, which: int, coords: Coords) -> Steps:
    # The bits of rbg keys come from XLA's own generator. It makes arrays as a whole, as
    # it takes no place to begin at, and on TPU its bits change with the shards
    # (https://github.com/jax-ml/jax/issues/40232).
    require(jx.key_impl(node.inputs[0].dtype) == THREEFRY)
    batch = node.inputs[0].ndim
    key = yield At(0, coords[:batch])
    high, low = ravel_wide(coords[batch:], tuple(node.params["shape"]))
    key0, key1, high, low = spread([*key, high, low])
    return threefry.random_bits(key0, key1, high, low, node.params["bit_width"])


@rule("threefry2x32")
def _threefry2x32(node: Node, which: int, coords: Coords) -> Steps:
    require_plain(node)
    words = []
    for number, value in enumerate(node.inputs):
        words.append((yield At(number, same_place(value, node.outputs[which], coords))))
    return threefry.hash_on_device(*spread(words))[which]


def elements(array: Values, value: Value, coords: Coords) -> Elements:
    """The elements of an array that is there in full; of keys, their words."""
    if jx.is_key(value.dtype):
        words = jax.random.key_data(array)
        words = words.reshape(-1, words.shape[-1])
        return tuple(
            take(words[:, i], value.shape, coords) for i in range(words.shape[1])
        )
    return take(jax.numpy.asarray(array).reshape(-1), value.shape, coords)


def take(flat: Values, shape: Sequence[Dim], coords: Coords) -> Values:
    """Elements of a flat array that stands for one of ``shape``, maybe symbolic."""
    # Clipped, since the lanes that pad a window lie beyond its end.
    if all(map(is_one, shape)):
        return flat[0]
    return jax.numpy.asarray(flat).at[ravel(coords, shape)].get(mode="clip")
