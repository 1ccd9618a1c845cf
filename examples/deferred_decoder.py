"""A decoder of deferred parameters: built without an array, then filled three ways.

    python examples/deferred_decoder.py [FOLDER]

Twelve layers with rotary attention, a tied embedding table, and frozen parts. The model
is built uninitialised and shown. Then it is (1) initialised, sharded over the devices,
(2) filled from a checkpoint on disk that lacks one leaf, which is then initialised
alone, and (3) turned into empty parameters that Orbax restores straight into shards.
All three end with the same bits. Small sizes, so that it runs in seconds on a laptop;
eight CPU devices are simulated unless the machine has accelerators of its own.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

if "jax" not in sys.modules:
    os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from safetensors import safe_open
from safetensors.numpy import save_file

import shardinit
from shardinit import deferred
from shardinit.deferred import (
    FrozenParameter,
    Parameter,
    ParameterLike,
    Struct,
    UninitializedParameter,
    add_parameter_prefix,
    pytree_dataclass,
)

RULES = shardinit.AxisRules([("vocab", "model"), ("embed", "data"), ("mlp", "model")])


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the decoder."""

    layers: int = 12
    embed: int = 64
    heads: int = 4
    mlp: int = 128
    vocab: int = 128
    positions: int = 32


def weight(name: str, *sizes: tuple[str, int]) -> UninitializedParameter[jax.Array]:
    """A normal weight; the first axis is contracted, so it sets the scale."""
    axes, shape = tuple(axis for axis, _ in sizes), tuple(size for _, size in sizes)

    def draw(key: jax.Array) -> jax.Array:
        return jax.random.normal(key, shape) * shape[0] ** -0.5

    return UninitializedParameter(deferred.with_axes(draw, axes), name)


@pytree_dataclass
class Norm(Struct):
    """Root mean square normalisation."""

    scale: ParameterLike[jax.Array]

    @classmethod
    def build(cls, config: Config) -> Norm:
        """An uninitialised one."""
        ones = deferred.with_axes(lambda key: jnp.ones(config.embed), (None,))
        return cls(UninitializedParameter(ones, "scale"))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises the last axis."""
        size = jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)
        return x * size * self.scale.value


@pytree_dataclass
class Attention(Struct):
    """Causal attention; the rotary angles are a parameter that does not learn."""

    query: ParameterLike[jax.Array]
    key: ParameterLike[jax.Array]
    value: ParameterLike[jax.Array]
    out: ParameterLike[jax.Array]
    angles: ParameterLike[Any]
    heads: int = dataclasses.field(metadata={"pytree_node": False})

    @classmethod
    def build(cls, config: Config) -> Attention:
        """An uninitialised one, but for the angles."""
        embed, inner = ("embed", config.embed), ("mlp", config.embed)
        half = config.embed // config.heads // 2
        rates = 10_000.0 ** (-np.arange(half, dtype=np.float32) / half)
        angles = np.arange(config.positions, dtype=np.float32)[:, None] * rates
        return cls(
            weight("query", embed, inner),
            weight("key", embed, inner),
            weight("value", embed, inner),
            weight("out", inner, embed),
            FrozenParameter(angles, "angles"),
            config.heads,
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """From (length, embed) to the same."""
        length = x.shape[0]
        split = (length, self.heads, -1)
        query = self._rotate((x @ self.query.value).reshape(split))
        key = self._rotate((x @ self.key.value).reshape(split))
        value = (x @ self.value.value).reshape(split)
        scores = jnp.einsum("qhd,khd->hqk", query, key) * query.shape[-1] ** -0.5
        causal = jnp.tril(jnp.ones((length, length), bool))
        weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf))
        mixed = jnp.einsum("hqk,khd->qhd", weights, value)
        return mixed.reshape(length, -1) @ self.out.value

    def _rotate(self, x: jax.Array) -> jax.Array:
        angle = self.angles.value[: x.shape[0], None]
        left, right = jnp.split(x, 2, axis=-1)
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], -1)


@pytree_dataclass
class FeedForward(Struct):
    """A gated feed-forward layer."""

    gate: ParameterLike[jax.Array]
    up: ParameterLike[jax.Array]
    down: ParameterLike[jax.Array]
    activation: Callable[[jax.Array], jax.Array] = dataclasses.field(
        default=jax.nn.silu, metadata={"pytree_node": False}
    )

    @classmethod
    def build(cls, config: Config) -> FeedForward:
        """An uninitialised one."""
        embed, inner = ("embed", config.embed), ("mlp", config.mlp)
        return cls(
            weight("gate", embed, inner),
            weight("up", embed, inner),
            weight("down", inner, embed),
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """From (length, embed) to the same."""
        hidden = self.activation(x @ self.gate.value) * (x @ self.up.value)
        return hidden @ self.down.value


@pytree_dataclass
class Block(Struct):
    """One layer of the decoder; each part under a prefix of its own."""

    attention_norm: Norm
    attention: Attention
    mlp_norm: Norm
    mlp: FeedForward

    @classmethod
    def build(cls, config: Config) -> Block:
        """An uninitialised one."""
        return cls(
            add_parameter_prefix("attention_norm", Norm.build(config)),
            add_parameter_prefix("attention", Attention.build(config)),
            add_parameter_prefix("mlp_norm", Norm.build(config)),
            add_parameter_prefix("mlp", FeedForward.build(config)),
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """From (length, embed) to the same."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


@pytree_dataclass
class Decoder(Struct):
    """Embedding, blocks, and the same embedding table again as the last layer."""

    table: ParameterLike[jax.Array]
    blocks: list[Block]
    norm: Norm
    head: ParameterLike[jax.Array]

    @staticmethod
    def build(config: Config) -> deferred.WithSharedParameters[Decoder]:
        """An uninitialised one, wrapped in the owner of its shared table."""
        table = weight("table", ("vocab", config.vocab), ("embed", config.embed))
        shared = deferred.mark_shareable(add_parameter_prefix("embedder", table))
        blocks = [
            add_parameter_prefix(f"layer_{number}", Block.build(config))
            for number in range(config.layers)
        ]
        norm = add_parameter_prefix("norm", Norm.build(config))
        whole = deferred.attach_shared_parameters(Decoder(shared, blocks, norm, shared))
        return add_parameter_prefix("decoder", whole)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """From (length,) token numbers to (length, vocab) logits."""
        x = self.table.value[tokens]
        for block in self.blocks:
            x = block(x)
        return self.norm(x) @ self.head.value.T


Model = deferred.WithSharedParameters[Decoder]


def show(model: Model, page: Path) -> str:
    """Writes the model as treescope renders it to a page; a few lines for here."""
    try:
        import treescope
    except ImportError:
        return repr(model.body.blocks[0].mlp)
    page.write_text(treescope.render_to_html(model))
    return treescope.render_to_text(model.body.blocks[0].mlp)


def deferred_ones(model: Model) -> deferred.Selection[UninitializedParameter[Any]]:
    """What has no value yet."""
    return model.select().at_instances_of(UninitializedParameter)


def by_name(model: Model) -> dict[str, jax.Array]:
    """Values of the parameters that learn."""
    found = model.select().at_instances_of(Parameter).get_sequence()
    return {parameter.name: parameter.value for parameter in found}


def shardings(model: Model, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Where each parameter will lie, by name: a plan makes no array."""
    plan = shardinit.plan(deferred.init_fn(model), mesh=mesh, rules=RULES)
    names = [parameter.name for parameter in deferred_ones(model).get_sequence()]
    return {n: leaf.sharding for n, leaf in zip(names, plan.leaves, strict=True)}


def fill(model: Model, file: Path, places: dict[str, Any]) -> Model:
    """Takes what a safetensors file has, each device reading its own shard."""
    with safe_open(file, framework="numpy") as stored:
        there = set(stored.keys())

        def take(parameter: UninitializedParameter[jax.Array]) -> Any:
            if parameter.name not in there:
                return parameter
            part = stored.get_slice(parameter.name)
            value = jax.make_array_from_callback(
                tuple(part.get_shape()),
                places[parameter.name],
                lambda index: part[index],
            )
            return parameter.initialize_with_value(value)

        return deferred_ones(model).apply(take)


def restore(model: Model, folder: Path, places: dict[str, Any]) -> Model:
    """Empty parameters with shardings, for Orbax to read into."""

    def empty(parameter: UninitializedParameter[Any]) -> Any:
        made = parameter.as_empty_parameter()
        sharding = places[parameter.name]
        return dataclasses.replace(made, value=made.value.update(sharding=sharding))

    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder, deferred_ones(model).apply(empty))


def same(left: Model, right: Model) -> bool:
    """Whether two models have the same values, bit for bit, in the same places."""
    a, b = by_name(left), by_name(right)
    return a.keys() == b.keys() and all(
        a[n].sharding == b[n].sharding and np.array_equal(a[n], b[n]) for n in a
    )


def loss(model: Model, tokens: jax.Array) -> jax.Array:
    """Mean cross-entropy of the next token."""
    logits = jax.nn.log_softmax(model(tokens[:-1]))
    return -jnp.mean(jnp.take_along_axis(logits, tokens[1:, None], axis=-1))


def main(folder: Path) -> None:
    """Builds the decoder, fills it three ways, and takes one gradient."""
    devices = len(jax.devices())
    mesh = jax.make_mesh(
        (devices // 2 or 1, min(devices, 2)),
        ("data", "model"),
        axis_types=(jax.sharding.AxisType.Auto,) * 2,
    )
    key = jax.random.key(0)

    model = Decoder.build(Config())
    print("the feed-forward part of the first of 12 layers:")
    print(show(model, folder / "decoder.html"))
    count = deferred_ones(model).count()
    print(f"built: {count} parameters without a value")
    places = shardings(model, mesh)

    first = shardinit.init(deferred.init_fn(model), key, mesh=mesh, rules=RULES)
    deferred.assert_no_uninitialized(first)
    values = by_name(first)
    table = values["decoder.embedder.table"]
    print(
        f"1. initialised: {len(values)} parameters; the table lies as {table.sharding}"
    )

    lost = "decoder.layer_7.mlp.gate"
    file = folder / "decoder.safetensors"
    save_file({n: np.asarray(v) for n, v in values.items() if n != lost}, file)
    filled = fill(model, file, places)
    (missing,) = deferred_ones(filled).get_sequence()
    assert missing.name == lost
    filled = shardinit.init(deferred.init_fn(filled), key, mesh=mesh, rules=RULES)
    print(f"2. filled from {file.name}; {missing.name} initialised alone:", end=" ")
    print("same bits" if same(first, filled) else "OTHER BITS")

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "orbax", first)
    restored = restore(model, folder / "orbax", places)
    print("3. restored into empty parameters:", end=" ")
    print("same bits" if same(first, restored) else "OTHER BITS")

    tokens = jnp.arange(17) * 7 % 128
    learns = restored.select().at_instances_of(Parameter)
    learned, rest = learns.partition()
    value, grads = jax.jit(
        jax.value_and_grad(lambda p, t: loss(deferred.combine(p, rest), t))
    )(learned, tokens)
    print(f"loss {value:.3f}; gradients for {len(jax.tree.leaves(grads))} arrays")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]).resolve())
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary).resolve())
