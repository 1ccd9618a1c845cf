"""One decoder for many families, driven by the keys of a ``config.json``.

The families of decoder-only language models differ in a handful of choices: where
positions enter, how heads are shared, what is normalised, where biases are, whether
the MLP is a mixture of experts. `DecoderConfig` names those choices and this module
makes one Flax NNX model of them, with a logical name for every dimension of every
parameter.

Layers are unrolled by default, each a subtree of its own (``layers/3/mlp/up/kernel``),
as checkpoints have them. Stacked, the parameters of all equal layers lie along a
leading axis named ``layers`` and the forward pass scans over it; a mixture of experts
whose first layers are dense makes two stacks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from shardinit.core.init_fn import InitFn
from shardinit.frontends import nnx as frontend
from shardinit.models.attention import Attention, LatentAttention
from shardinit.models.config import DecoderConfig
from shardinit.models.keys import schema
from shardinit.models.layers import Embedding, Linear, Norm
from shardinit.models.mlp import Mlp, Moe
from shardinit.models.registry import register


class Layer(nnx.Module):
    """Attention, then an MLP or a mixture of experts; each adds to its input."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs, *, dense: bool):
        self.attention_norm = Norm(config.hidden_size, config)
        if config.latent is None:
            self.attention = Attention(config, rngs)
        else:
            self.attention = LatentAttention(config, config.latent, rngs)
        self.mlp_norm = Norm(config.hidden_size, config)
        if dense or config.experts is None:
            self.mlp = Mlp(config.mlp_size, config, rngs)
        else:
            self.moe = Moe(config.experts, config, rngs)

    def __call__(self, x: jax.Array, window: jax.Array | int | None) -> jax.Array:
        """Maps (batch, length, embed) to the same shape."""
        x = x + self.attention(self.attention_norm(x), window)
        inner = self.moe if hasattr(self, "moe") else self.mlp
        return x + inner(self.mlp_norm(x))


def _stack(config: DecoderConfig, rngs: nnx.Rngs, count: int, *, dense: bool) -> Layer:
    """A layer whose parameters have a leading axis of ``count`` layers."""

    @nnx.split_rngs(splits=count)
    @nnx.vmap(transform_metadata={nnx.PARTITION_NAME: "layers"})
    def layers(rngs: nnx.Rngs) -> Layer:
        return Layer(config, rngs, dense=dense)

    return layers(rngs)


class Decoder(nnx.Module):
    """A decoder-only language model.

    Attributes:
      config: the architecture.
      embed: embedding of the tokens.
      positions: embedding of the positions, where they are learned.
      layers: the layers; of a stacked mixture of experts, those with experts.
      dense_layers: in the stacked layout, the dense layers before those.
      norm: last norm.
      lm_head: projection to the vocabulary, unless it is tied to the embedding.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embed = Embedding("vocab", config.vocab_size, config, rngs)
        if config.positions:
            self.positions = Embedding("position", config.positions, config, rngs)
        dense = config.num_dense if config.experts else config.num_layers
        if not config.stacked:
            self.layers = nnx.List(
                [Layer(config, rngs, dense=i < dense) for i in range(config.num_layers)]
            )
        else:
            rest = config.num_layers - dense
            if dense:
                name = "dense_layers" if config.experts else "layers"
                setattr(self, name, _stack(config, rngs, dense, dense=True))
            if rest:
                self.layers = _stack(config, rngs, rest, dense=False)
        self.norm = Norm(config.hidden_size, config)
        if not config.tied:
            embed, vocab = ("embed", config.hidden_size), ("vocab", config.vocab_size)
            self.lm_head = Linear((embed,), (vocab,), config, rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """The logits of the next token at each position.

        Args:
          tokens: token ids, integers, shape (batch, length).

        Returns:
          float32, shape (batch, length, vocab).

        Raises:
          ValueError: positions are learned and there are fewer than tokens.
        """
        x = self.embed(tokens)
        length, positions = tokens.shape[1], self.config.positions
        if positions:
            if length > positions:
                raise ValueError(f"{length} tokens, but only {positions} positions")
            x = x + self.positions(jnp.arange(length))
        windows = self.config.windows
        for layers in (getattr(self, n, None) for n in ("dense_layers", "layers")):
            if isinstance(layers, nnx.List):
                for layer, window in zip(layers, windows, strict=True):
                    x = layer(x, window)
            elif layers is not None:
                count = layers.attention_norm.scale.shape[0]
                x = _scan(layers, x, windows[:count])
                windows = windows[count:]
        x = self.norm(x)
        logits = self.embed.attend(x) if self.config.tied else self.lm_head(x)
        return logits.astype(jnp.float32)


def _scan(stack: Layer, x: jax.Array, windows: tuple[int | None, ...]) -> jax.Array:
    graph, state = nnx.split(stack)
    width = x.shape[1]  # a window as long as the text hides nothing
    seen = jnp.asarray([width if w is None else w for w in windows], jnp.int32)

    def step(x: jax.Array, layer: Any) -> tuple[jax.Array, None]:
        state, window = layer
        return nnx.merge(graph, state)(x, window), None

    return jax.lax.scan(step, x, (state, seen))[0]


@register("decoder", schema=schema())
def build(config: Mapping[str, Any]) -> InitFn:
    """The `InitFn` of the decoder that a config in Hugging Face's keys describes.

    Raises:
      SpecError: the config has faults; lists every one, by field.
    """
    return frontend.init_fn(Decoder, DecoderConfig.from_dict(config))
