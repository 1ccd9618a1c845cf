"""Sources: where elements come from, random bits above all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax import lax

from shardinit.core.ir import jaxpr as jx
from shardinit.core.ir.graph import Node, Value
from shardinit.core.prng import threefry
from shardinit.core.prng.derivation import THREEFRY
from shardinit.core.window.coordinates import Coords, ravel, ravel_wide, spread
from shardinit.core.window.rules.elementwise import plain, pull_elementwise
from shardinit.core.window.rules.rule import Rule


def _push_iota(node: Node, which: int, coords: Coords, args: Sequence[Any]) -> Any:
    coord = coords[node.params["dimension"]]
    return lax.convert_element_type(coord, node.params["dtype"])


def _pull_bits(node: Node, which: int, coords: Coords) -> list[Coords | None]:
    return [coords[: node.inputs[0].ndim]]


def _push_bits(node: Node, which: int, coords: Coords, args: Sequence[Any]) -> Any:
    (key,) = args
    shape = tuple(node.params["shape"])
    high, low = ravel_wide(coords[node.inputs[0].ndim :], shape)
    key0, key1, high, low = spread([*key, high, low])
    return threefry.random_bits(key0, key1, high, low, node.params["bit_width"])


def _push_threefry(node: Node, which: int, coords: Coords, args: Sequence[Any]) -> Any:
    key0, key1, high, low = spread(args)
    return threefry.hash_on_device(key0, key1, high, low)[which]


def _threefry_keys(node: Node) -> bool:
    return jx.key_impl(node.inputs[0].dtype) == THREEFRY


def elements(whole: Any, value: Value, coords: Coords) -> Any:
    """The elements of an array that is there whole, at ``coords``; keys as words."""
    if jx.is_key(value.dtype):
        words = jax.random.key_data(whole)
        words = words.reshape(-1, words.shape[-1])
        return tuple(
            take(words[:, i], value.shape, coords) for i in range(words.shape[1])
        )
    return take(jax.numpy.asarray(whole).reshape(-1), value.shape, coords)


def take(flat: Any, shape: Sequence[int], coords: Coords) -> Any:
    """Elements of a flat array that stands for one of ``shape``."""
    # Clipped, since the lanes that pad a window lie beyond its end.
    if math.prod(shape) == 1:
        return flat[0]
    return jax.numpy.asarray(flat).at[ravel(coords, shape)].get(mode="clip")


SOURCES: dict[str, Rule] = {
    "iota": Rule(lambda node, which, coords: [], _push_iota),
    "random_bits": Rule(_pull_bits, _push_bits, _threefry_keys),
    "threefry2x32": Rule(pull_elementwise, _push_threefry, plain),
}
