"""Modules that initialise on first sight of their input, and end sharded.

Three models: an MLP, a small convolutional net with BatchNorm, and a transformer block
built compact. Each is initialised on a mesh of eight simulated devices, every device
making its own shards, and takes one step of training.

    python examples/module_net.py
"""

from __future__ import annotations

import os
from typing import Any

if __name__ == "__main__":  # before JAX is imported: eight devices on any machine
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

import shardinit
from shardinit import module as tx

RULES = shardinit.AxisRules(
    [("embed", "data"), ("heads", "model"), ("mlp", "model"), ("vocab", "model")]
)


class ConvNet(tx.Module):
    """Convolutions with BatchNorm; submodules are made in ``__init__``."""

    def __init__(self, features: tuple[int, ...], classes: int):
        self.convs = [tx.Conv(n, (3, 3), strides=2) for n in features]
        self.norms = [tx.BatchNorm() for _ in features]
        self.head = tx.Linear(classes)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Images (batch, height, width, channels) to logits (batch, classes)."""
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = jax.nn.relu(norm(conv(x)))
        return self.head(x.mean((1, 2)))


class Attention(tx.Module):
    """Causal self-attention, its weights drawn from the shape of the first input."""

    qkv: jax.Array | None = tx.Parameter.node(None, axes=("embed", None, "heads", None))
    out: jax.Array | None = tx.Parameter.node(None, axes=("heads", None, "embed"))

    def __init__(self, heads: int):
        self.heads = heads

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x (batch, sequence, size) to the same shape."""
        if self.initializing():
            size = x.shape[-1]
            each = size // self.heads
            init = jax.nn.initializers.normal(size**-0.5)
            self.qkv = init(tx.next_key(), (size, 3, self.heads, each))
            self.out = init(tx.next_key(), (self.heads, each, size))
        q, k, v = jnp.moveaxis(jnp.einsum("bse,ekhd->bskhd", x, self.qkv), 2, 0)
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        return jnp.einsum("bshd,hde->bse", y, self.out)


class Block(tx.Module):
    """A transformer block built compact, with all three mechanisms in one module."""

    residual_scale: Any = tx.Parameter.node(axes=(None,))
    layer_scale: Any = tx.Parameter.node(None, axes=(None,))
    shift: Any = tx.Parameter.node(None, axes=("embed",))

    def __init__(self, heads: int, hidden: int):
        self.heads = heads
        self.hidden = hidden
        # first: needs a key and nothing else
        self.residual_scale = tx.Initializer(
            lambda key: jax.random.uniform(key, (2,), minval=0.5, maxval=1.0)
        )

    def rng_init(self) -> None:
        """Second: sees what the first has made."""
        noise = 0.01 * jax.random.uniform(tx.next_key(), (2,))
        self.layer_scale = self.residual_scale + noise

    @tx.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps x (batch, sequence, size) to the same shape."""
        if self.initializing():  # last: sees the shape of the input
            self.shift = 0.02 * jax.random.normal(tx.next_key(), x.shape[-1:])
        y = tx.RMSNorm(axes=("embed",))(x + self.shift)
        x = x + self.layer_scale[0] * Attention(self.heads)(y)
        y = tx.RMSNorm(axes=("embed",))(x)
        y = tx.Linear(self.hidden, kernel_axes=("embed", "mlp"))(y)
        y = tx.Linear(x.shape[-1], kernel_axes=("mlp", "embed"))(jax.nn.gelu(y))
        return x + self.layer_scale[1] * y


class Transformer(tx.Module):
    """Tokens to logits."""

    def __init__(self, vocabulary: int, size: int, layers: int):
        self.embed = tx.Embed(vocabulary, size, embedding_axes=("vocab", "embed"))
        self.blocks = [Block(heads=8, hidden=4 * size) for _ in range(layers)]
        self.head = tx.Linear(
            vocabulary, use_bias=False, kernel_axes=("embed", "vocab")
        )

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Tokens (batch, sequence) to logits (batch, sequence, vocabulary)."""
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@jax.jit
def train_step(model, inputs, labels):
    """One step of gradient descent; BatchNorm moves its statistics along."""

    def loss_of(parameters, model):
        model = model.merge(parameters)
        logits = model(inputs)
        picked = jnp.take_along_axis(
            jax.nn.log_softmax(logits), labels[..., None], axis=-1
        )
        return -picked.mean(), model.filter(tx.BatchStat)

    parameters = model.trainable_parameters()
    gradients, statistics = jax.grad(loss_of, has_aux=True)(parameters, model)
    parameters = jax.tree.map(lambda p, g: p - 0.1 * g, parameters, gradients)
    return model.merge(parameters, statistics)


def models(key: jax.Array) -> dict[str, tuple[tx.Module, jax.Array, jax.Array]]:
    """Name to a model without values, an example input and labels."""
    image = jax.random.normal(key, (8, 16, 16, 3))
    tokens = jax.random.randint(key, (8, 16), 0, 64)
    return {
        "mlp": (tx.MLP([64, 64, 10]), image.reshape(8, -1), jnp.arange(8)),
        "convnet": (ConvNet((16, 32), 10), image, jnp.arange(8)),
        "transformer": (Transformer(64, 64, 2), tokens, tokens),
    }


def main() -> dict[str, tuple[tx.Module, tx.Module]]:
    """Each model, initialised on the mesh, before and after one step of training."""
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    done = {}
    for name, (model, inputs, labels) in models(jax.random.key(0)).items():
        rules = RULES if name == "transformer" else shardinit.fsdp(min_bytes=1024)
        print(shardinit.plan(tx.init_fn(model, inputs), mesh=mesh, rules=rules))
        made = model.init(42, inputs, mesh=mesh, rules=rules)
        done[name] = made, train_step(made, inputs, labels)
        print(model.tabulate(inputs))
    return done


if __name__ == "__main__":
    main()
