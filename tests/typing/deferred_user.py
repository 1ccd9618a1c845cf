"""Deferred parameters as a user writes them, for pyright: no test runs this file.

``assert_type`` says what pyright must infer; an ``ignore`` on a line that pyright would
accept is an error of its own (reportUnnecessaryTypeIgnoreComment, below).
"""

# pyright: strict, reportUnnecessaryTypeIgnoreComment=true
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import assert_type

import jax
import jax.numpy as jnp

from shardinit import deferred
from shardinit.deferred import (
    FrozenParameter,
    Parameter,
    ParameterLike,
    Selection,
    Struct,
    UninitializedParameter,
    WithSharedParameters,
    pytree_dataclass,
)

Weights = dict[str, jax.Array]


@pytree_dataclass
class Linear(Struct):
    kernel: ParameterLike[jax.Array]
    bias: ParameterLike[jax.Array]
    width: int = dataclasses.field(metadata={"pytree_node": False})

    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.kernel.value + self.bias.value


@pytree_dataclass(has_implicitly_inherited_fields=True, kw_only=True)
class Scaled(Linear):
    scale: float = 1.0


@pytree_dataclass
class Written(Struct):
    size: int
    half: int

    def __init__(self, size: int):
        self.size = size
        self.half = size // 2


def draw(key: jax.Array) -> jax.Array:
    return jax.random.normal(key, (4, 8))


def draw_tree(key: jax.Array) -> Weights:
    return {"a": draw(key)}


class Renaming(deferred.SupportsParameterRenaming):
    def with_renamed_parameters(self, rename_fn: Callable[[str], str]) -> Renaming:
        del rename_fn
        return self


def use() -> None:
    kernel = UninitializedParameter(draw, "kernel")
    assert_type(kernel, UninitializedParameter[jax.Array])
    tree = UninitializedParameter(draw_tree, name="tree")
    assert_type(tree.value, Weights)
    key = jax.random.key(0)
    assert_type(kernel.initialize(key), Parameter[jax.Array])
    assert_type(tree.initialize_with_value({}, strict_dtype=False), Parameter[Weights])
    assert_type(kernel.as_empty_parameter(), Parameter[jax.Array])
    renamed = kernel.with_renamed_parameters(str.upper)
    assert_type(renamed, UninitializedParameter[jax.Array])

    frozen = FrozenParameter(jnp.ones(8), "bias")
    layer = Linear(kernel, frozen, 8)
    assert_type(layer.bias.value, jax.Array)
    assert_type(layer(jnp.ones(4)), jax.Array)
    assert_type(layer.width, int)
    Linear(kernel, frozen)  # pyright: ignore[reportCallIssue]
    Linear(kernel, 3, 8)  # pyright: ignore[reportArgumentType]
    Scaled(kernel=kernel, bias=frozen, width=8, scale=2.0)

    Written(4)
    Written(4, 2)  # pyright: ignore[reportCallIssue]

    assert_type(deferred.add_parameter_prefix("a", layer), Linear)
    assert_type(deferred.mark_shareable(layer), Linear)
    shared = deferred.attach_shared_parameters(layer, strict=False)
    assert_type(shared, WithSharedParameters[Linear])
    assert_type(shared.resolved(), Linear)
    assert_type(deferred.initialize_parameters([layer], key), list[Linear])

    assert_type(layer.select(), Selection[Linear])
    found = layer.select().at_instances_of(FrozenParameter)
    assert found.get().name
    assert_type(deferred.select(layer).get(), Linear)
    assert_type(deferred.with_axes(draw, ("a", None))(key), jax.Array)
    assert_type(Linear.from_attributes(kernel=kernel, bias=frozen, width=1), Linear)
