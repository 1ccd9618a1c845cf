"""DecoderConfig: what a ``config.json`` says of the parameters, in one vocabulary.

The families name the same quantities differently and leave different ones out. Here
each quantity has one name and every default is filled in, so that the model itself
never asks which family it is. All faults are gathered before any is raised: whoever
writes a spec sees everything that is wrong with it at once, by field.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from shardinit.errors import SpecError
from shardinit.models.checks import close_to, read_values, refuse_unknown
from shardinit.models.keys import FAMILIES
from shardinit.models.relations import check_relations

# What no key of a family's config says.
_TRAITS: dict[str, dict[str, Any]] = {
    "gpt2": {
        "attention_bias": True,
        "mlp_bias": True,
        "gated": False,
        "layer_norm": True,
        "scaled_residual": True,
    },
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
    "deepseek_v3": {"correction_bias": True},
}


@dataclass(frozen=True)
class Experts:
    """Mixture of experts in place of the MLP.

    Attributes:
      num: number of routed experts.
      size: inner width of one expert.
      shared_size: inner width of the experts that every token uses; 0 for none.
      correction_bias: the router has a bias that balances the experts.
      stacked: experts lie along a leading axis, else each has its own subtree.
    """

    num: int
    size: int
    shared_size: int
    correction_bias: bool
    stacked: bool


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention: queries, keys and values of low rank.

    Attributes:
      q_rank: rank of the queries, None if they are not compressed.
      kv_rank: rank of keys and values.
      nope_dim: part of a head without position.
      rope_dim: part of a head with rotary position, shared by all key heads.
      v_dim: width of a value head.
    """

    q_rank: int | None
    kv_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """What decides a decoder's parameters, every default filled in.

    Attributes:
      vocab_size: number of token ids.
      hidden_size: width of the residual stream.
      num_layers: number of layers.
      num_dense: of a mixture of experts, how many first layers are dense.
      num_heads: query heads.
      num_kv_heads: key and value heads.
      head_dim: width of a head, unless attention is latent.
      mlp_size: inner width of the dense MLP.
      gated: the MLP has a gate beside its up projection.
      layer_norm: norms have biases.
      qk_norm: queries and keys have norms of a head's width.
      qkv_bias: query, key and value projections have biases.
      out_bias: the attention's output projection has a bias.
      mlp_bias: MLP projections have biases.
      tied: the logits use the embedding: there is no projection of their own.
      positions: number of learned positions; 0 if positions are rotary.
      experts: mixture of experts, if any.
      latent: latent attention, if any.
      std: standard deviation of random weights.
      residual_std: that of the projections that end a residual branch.
      param_dtype: name of the parameters' dtype.
      init_dtype: name of the dtype in which random weights are drawn.
      stacked: layers lie along a leading axis, else each has its own subtree.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_dense: int = 0
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_size: int
    gated: bool = True
    layer_norm: bool = False
    qk_norm: bool = False
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool = False
    tied: bool
    positions: int = 0
    experts: Experts | None
    latent: Latent | None
    std: float
    residual_std: float
    param_dtype: str
    init_dtype: str
    stacked: bool

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> DecoderConfig:
        """Reads a config in Hugging Face's keys.

        Raises:
          SpecError: the config has faults; lists every one, by field.
        """
        faults: list[tuple[str, str]] = []

        def fault(field: str, text: str) -> None:
            if (field, text) not in faults:
                faults.append((field, text))

        family = config.get("model_type")
        if family not in FAMILIES:
            known = ", ".join(FAMILIES)
            got = "missing" if family is None else f"{family!r} is unknown"
            fault("model_type", f"{got}; one of {known}{close_to(family, FAMILIES)}")
            family = None
        values = read_values(config, family, fault)
        refuse_unknown(config, family, fault)
        if family is not None:
            check_relations(family, values, fault)
        if family is None or faults:
            raise SpecError("decoder", faults)
        return _resolve(_TRAITS.get(family, {}) | values)


_DTYPES = ("param_dtype", "dtype", "torch_dtype")  # the first that is given counts


def _resolve(v: Mapping[str, Any]) -> DecoderConfig:
    width, heads, std = v["hidden_size"], v["num_heads"], v["std"]
    biased = v.get("attention_bias", False)
    residual_std = std / (2 * v["num_layers"]) ** 0.5 if "scaled_residual" in v else std
    derived = {
        "num_kv_heads": v.get("num_kv_heads") or heads,
        "head_dim": v.get("head_dim") or width // heads,
        "mlp_size": v["mlp_size"] or 4 * width,
        "qkv_bias": v.get("qkv_bias", biased),
        "out_bias": biased,
        "experts": _experts(v) if "num_experts" in v else None,
        "latent": _latent(v) if "kv_rank" in v else None,
        "residual_std": residual_std,
        "param_dtype": next(filter(None, map(v.__getitem__, _DTYPES)), "float32"),
        "stacked": v["layer_layout"] == "stacked",
    }
    names = (field.name for field in fields(DecoderConfig))
    given = {name: v[name] for name in names if name in v}
    return DecoderConfig(**given | derived)


def _experts(v: Mapping[str, Any]) -> Experts:
    size = v["expert_size"] if "expert_size" in v else v["mlp_size"]
    return Experts(
        num=v["num_experts"],
        size=size,
        shared_size=v.get("num_shared", 0) * size,
        correction_bias=v.get("correction_bias", False),
        stacked=v["expert_layout"] == "stacked",
    )


def _latent(v: Mapping[str, Any]) -> Latent:
    names = ("q_rank", "kv_rank", "nope_dim", "rope_dim", "v_dim")
    return Latent(**{name: v[name] for name in names})
