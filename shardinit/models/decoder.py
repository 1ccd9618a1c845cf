"""The parameters of a decoder, for many families, by the keys of a ``config.json``.

The families of decoder-only language models differ in a handful of choices: where
positions enter, how heads are shared, what is normalised, where biases are, whether
the MLP is a mixture of experts. `DecoderConfig` names those choices, and this module
says which parameters follow from them. Kernels keep heads and the width of a head as
separate dimensions, so that a mesh can split whole heads.

Layers are unrolled by default, each a subtree of its own (``layers/3/mlp/up/kernel``),
as checkpoints have them. Stacked, the parameters of all equal layers lie along a
leading axis named ``layers``; a mixture of experts whose first layers are dense makes
two stacks. There is no forward pass: whoever trains a model brings one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shardinit.core.init_fn import InitFn
from shardinit.extras import needs
from shardinit.frontends import nnx as frontend
from shardinit.models.config import DecoderConfig, Experts, Latent
from shardinit.models.keys import schema
from shardinit.models.parameters import Dims, Param, Parameters, Stacked, Tree
from shardinit.models.registry import register

with needs("flax", "shardinit[flax]"):
    from flax import nnx


class RouterBias(nnx.Variable):
    """Moved by a rule that balances the experts, never by a gradient: no parameter."""


def _normal(dims: Dims, c: DecoderConfig, std: float | None = None) -> Param:
    std = c.std if std is None else std
    return Param(dims, c.param_dtype, std=std, draw=c.init_dtype)


def _linear(
    inputs: Dims,
    outputs: Dims,
    c: DecoderConfig,
    *,
    bias: bool = False,
    std: float | None = None,
) -> Tree:
    tree: Tree = {"kernel": _normal(inputs + outputs, c, std)}
    if bias:
        tree["bias"] = Param(outputs, c.param_dtype, fill=0)
    return tree


def _norm(size: int, c: DecoderConfig) -> Tree:
    dims = (("norm", size),)
    tree: Tree = {"scale": Param(dims, c.param_dtype, fill=1)}
    if c.layer_norm:
        tree["bias"] = Param(dims, c.param_dtype, fill=0)
    return tree


def _embed(c: DecoderConfig) -> Dims:
    return (("embed", c.hidden_size),)


def _table(name: str, count: int, c: DecoderConfig) -> Tree:
    return {"embedding": _normal(((name, count), *_embed(c)), c)}


def _attention(c: DecoderConfig) -> Tree:
    """Grouped-query attention."""
    embed, width = _embed(c), ("head_dim", c.head_dim)
    heads, shared = ("heads", c.num_heads), ("kv_heads", c.num_kv_heads)
    tree: Tree = {
        "q": _linear(embed, (heads, width), c, bias=c.qkv_bias),
        "k": _linear(embed, (shared, width), c, bias=c.qkv_bias),
        "v": _linear(embed, (shared, width), c, bias=c.qkv_bias),
        "o": _linear((heads, width), embed, c, bias=c.out_bias, std=c.residual_std),
    }
    if c.qk_norm:
        tree |= {"q_norm": _norm(c.head_dim, c), "k_norm": _norm(c.head_dim, c)}
    return tree


def _latent_attention(latent: Latent, c: DecoderConfig) -> Tree:
    """Multi-head latent attention: what is projected from is compressed first."""
    embed, heads = _embed(c), ("heads", c.num_heads)

    def head(width: int) -> Dims:
        return (heads, ("head_dim", width))

    def low(name: str, rank: int, extra: int, outputs: Dims) -> Tree:
        axis = f"{name}_lora"
        return {
            f"{name}_a": _linear(embed, ((axis, rank + extra),), c, bias=c.out_bias),
            f"{name}_norm": _norm(rank, c),
            f"{name}_b": _linear(((axis, rank),), outputs, c),
        }

    whole = head(latent.nope_dim + latent.rope_dim)
    pair = head(latent.nope_dim + latent.v_dim)
    if latent.q_rank is None:
        query = {"q": _linear(embed, whole, c)}
    else:
        query = low("q", latent.q_rank, 0, whole)
    # one rotary key serves all heads, beside the compressed keys and values
    pairs = low("kv", latent.kv_rank, latent.rope_dim, pair)
    value = head(latent.v_dim)
    return (
        query
        | pairs
        | {"o": _linear(value, embed, c, bias=c.out_bias, std=c.residual_std)}
    )


def _mlp(size: int, c: DecoderConfig) -> Tree:
    embed, inner = _embed(c), (("mlp", size),)
    names = ("gate", "up") if c.gated else ("up",)
    tree: Tree = {name: _linear(embed, inner, c, bias=c.mlp_bias) for name in names}
    tree["down"] = _linear(inner, embed, c, bias=c.mlp_bias, std=c.residual_std)
    return tree


def _expert(leading: Dims, size: int, c: DecoderConfig) -> Tree:
    """The weights of one expert, or of all experts along a leading axis."""
    embed, inner = _embed(c), (("mlp", size),)
    return {
        "gate": _normal(leading + embed + inner, c),
        "up": _normal(leading + embed + inner, c),
        "down": _normal(leading + inner + embed, c, c.residual_std),
    }


def _moe(experts: Experts, c: DecoderConfig) -> Tree:
    """A router, its experts, and experts that every token uses."""
    axis = (("expert", experts.num),)
    tree: Tree = {"router": _linear(_embed(c), axis, c)}
    if experts.correction_bias:
        bias = Param(axis, "float32", fill=0, variable=RouterBias)
        tree["router_bias"] = bias
    if experts.stacked:
        tree["experts"] = _expert(axis, experts.size, c)
    else:
        tree["experts"] = [_expert((), experts.size, c)] * experts.num
    if experts.shared_size:
        tree["shared"] = _mlp(experts.shared_size, c)
    return tree


def _layer(c: DecoderConfig, *, dense: bool) -> Tree:
    tree: Tree = {
        "attention_norm": _norm(c.hidden_size, c),
        "attention": _latent_attention(c.latent, c) if c.latent else _attention(c),
        "mlp_norm": _norm(c.hidden_size, c),
    }
    if dense or c.experts is None:
        tree["mlp"] = _mlp(c.mlp_size, c)
    else:
        tree["moe"] = _moe(c.experts, c)
    return tree


def _layers(c: DecoderConfig) -> Tree:
    dense = c.num_dense if c.experts else c.num_layers
    rest = c.num_layers - dense
    first, then = _layer(c, dense=True), _layer(c, dense=False)
    if not c.stacked:
        return {"layers": [first] * dense + [then] * rest}
    tree: Tree = {}
    if dense:
        tree["dense_layers" if c.experts else "layers"] = Stacked(dense, first)
    if rest:
        tree["layers"] = Stacked(rest, then)
    return tree


def parameters(c: DecoderConfig) -> Tree:
    """Every parameter of the decoder, in the order in which they are drawn."""
    tree: Tree = {"embed": _table("vocab", c.vocab_size, c)}
    if c.positions:
        tree["positions"] = _table("position", c.positions, c)
    tree |= _layers(c)
    tree["norm"] = _norm(c.hidden_size, c)
    if not c.tied:
        tree["lm_head"] = _linear(_embed(c), (("vocab", c.vocab_size),), c)
    return tree


class Decoder(Parameters):
    """The parameters of a decoder-only language model.

    Attributes:
      embed: embedding of the tokens.
      positions: embedding of the positions, where they are learned.
      layers: the layers; of a stacked mixture of experts, those with experts.
      dense_layers: in the stacked layout, the dense layers before those.
      norm: last norm.
      lm_head: projection to the vocabulary, unless it is tied to the embedding.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        super().__init__(parameters(config), rngs)


@register("decoder", schema=schema())
def build(config: Mapping[str, Any]) -> InitFn:
    """The `InitFn` of the decoder that a config in Hugging Face's keys describes.

    Raises:
      SpecError: the config has faults; lists every one, by field.
    """
    return frontend.init_fn(Decoder, DecoderConfig.from_dict(config))
