"""Attention: which earlier tokens a token reads, with or without low rank.

Query heads share key and value heads in equal groups. Kernels keep heads and the
width of a head as separate dimensions, so that a mesh can split whole heads and a
query lies with the keys that it reads. Latent attention first compresses what it
projects from: keys and values are expanded from one narrow vector a token, and
position enters only a part of each head, with a single rotary key for all of them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from shardinit.models.config import DecoderConfig, Latent
from shardinit.models.layers import Linear, Norm
from shardinit.models.rope import Rope


def rotate(x: jax.Array, rope: Rope) -> jax.Array:
    """Turns the last dimension of ``x`` by position.

    Args:
      x: shape (batch, length, heads, 2 * pairs).
      rope: rotary positions with that many pairs.
    """
    angles = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None, None] * jnp.asarray(
        rope.frequencies, jnp.float32
    )
    cos = (jnp.cos(angles) * rope.magnitude).astype(x.dtype)
    sin = (jnp.sin(angles) * rope.magnitude).astype(x.dtype)
    if rope.interleave:
        a, b = x[..., 0::2], x[..., 1::2]
    else:
        a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    window: jax.Array | int | None,
    scale: float,
) -> jax.Array:
    """Causal attention.

    Args:
      q: queries, shape (batch, length, heads, width).
      k: keys, shape (batch, length, kv_heads, width); kv_heads divides heads.
      v: values, shape (batch, length, kv_heads, value width).
      window: how many positions a token sees, itself included; None for all.
      scale: factor of the logits.

    Returns:
      Shape (batch, length, heads, value width).
    """
    batch, length, heads, _ = q.shape
    grouped = q.reshape(batch, length, k.shape[2], heads // k.shape[2], q.shape[3])
    logits = jnp.einsum("bqhgd,bkhd->bhgqk", grouped, k).astype(jnp.float32) * scale
    distance = jnp.arange(length)[:, None] - jnp.arange(length)
    seen = distance >= 0
    if window is not None:
        seen &= distance < window
    weights = jax.nn.softmax(jnp.where(seen, logits, -jnp.inf)).astype(q.dtype)
    y = jnp.einsum("bhgqk,bkhd->bqhgd", weights, v)
    return y.reshape(batch, length, heads, v.shape[3])


class Attention(nnx.Module):
    """Grouped-query attention."""

    q_norm: Norm | None = None
    k_norm: Norm | None = None

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        embed = (("embed", config.hidden_size),)
        heads = (("heads", config.num_heads), ("head_dim", config.head_dim))
        shared = (("kv_heads", config.num_kv_heads), ("head_dim", config.head_dim))
        bias = config.qkv_bias
        self.q = Linear(embed, heads, config, rngs, bias=bias)
        self.k = Linear(embed, shared, config, rngs, bias=bias)
        self.v = Linear(embed, shared, config, rngs, bias=bias)
        self.o = Linear(
            heads, embed, config, rngs, bias=config.out_bias, std=config.residual_std
        )
        if config.qk_norm:
            self.q_norm = Norm(config.head_dim, config)
            self.k_norm = Norm(config.head_dim, config)
        self.rope = config.rope

    def __call__(self, x: jax.Array, window: jax.Array | int | None) -> jax.Array:
        """Maps (batch, length, embed) to the same shape."""
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        scale = q.shape[-1] ** -0.5
        if self.rope is not None:
            q, k = rotate(q, self.rope), rotate(k, self.rope)
        return self.o(attend(q, k, v, window, scale))


class LatentAttention(nnx.Module):
    """Multi-head latent attention."""

    def __init__(self, config: DecoderConfig, latent: Latent, rngs: nnx.Rngs):
        assert config.rope is not None
        bias = config.out_bias
        embed = (("embed", config.hidden_size),)
        count = ("heads", config.num_heads)
        query = (count, ("head_dim", latent.nope_dim + latent.rope_dim))
        pair = (count, ("head_dim", latent.nope_dim + latent.v_dim))
        value = (count, ("head_dim", latent.v_dim))
        # norms inside the projections have an epsilon of their own in this family
        if latent.q_rank is None:
            self.q = Linear(embed, query, config, rngs)
        else:
            rank = (("q_lora", latent.q_rank),)
            self.q_a = Linear(embed, rank, config, rngs, bias=bias)
            self.q_norm = Norm(latent.q_rank, config, eps=1e-6)
            self.q_b = Linear(rank, query, config, rngs)
        rank = (("kv_lora", latent.kv_rank),)
        compressed = (("kv_lora", latent.kv_rank + latent.rope_dim),)
        self.kv_a = Linear(embed, compressed, config, rngs, bias=bias)
        self.kv_norm = Norm(latent.kv_rank, config, eps=1e-6)
        self.kv_b = Linear(rank, pair, config, rngs)
        self.o = Linear(value, embed, config, rngs, bias=bias, std=config.residual_std)
        self.latent = latent
        self.rope = config.rope

    def __call__(self, x: jax.Array, window: jax.Array | int | None) -> jax.Array:
        """Maps (batch, length, embed) to the same shape."""
        sizes = self.latent
        low = x if sizes.q_rank is None else self.q_norm(self.q_a(x))
        q = self.q(low) if sizes.q_rank is None else self.q_b(low)
        q, q_turned = jnp.split(q, [sizes.nope_dim], -1)
        compressed, turned = jnp.split(self.kv_a(x), [sizes.kv_rank], -1)
        k, v = jnp.split(self.kv_b(self.kv_norm(compressed)), [sizes.nope_dim], -1)
        q_turned = rotate(q_turned, self.rope)
        turned = rotate(turned[:, :, None], self.rope)
        turned = jnp.broadcast_to(turned, (*k.shape[:3], sizes.rope_dim))
        q = jnp.concatenate([q, q_turned], -1)
        k = jnp.concatenate([k, turned], -1)
        scale = q.shape[-1] ** -0.5 * self.rope.softmax
        return self.o(attend(q, k, v, window, scale))
