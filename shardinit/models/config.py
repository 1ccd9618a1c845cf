"""DecoderConfig: what a ``config.json`` says, checked and in one vocabulary.

The families name the same quantities differently and leave different ones out. Here
each quantity has one name and every default is filled in, so that the model itself
never asks which family it is. All faults are gathered before any is raised: whoever
writes a spec sees everything that is wrong with it at once, by field.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from shardinit.errors import SpecError
from shardinit.models.checks import close_to, read_values, refuse_unknown
from shardinit.models.keys import FAMILIES
from shardinit.models.rope import Rope, read_rope

MAX_ROTARY = 1 << 16


@dataclass(frozen=True)
class Experts:
    """Mixture of experts in place of the MLP.

    Attributes:
      num: number of routed experts.
      top_k: experts that a token uses.
      size: inner width of one expert.
      shared_size: inner width of the experts that every token uses; 0 for none.
      groups: groups of experts; a token chooses among the best ``top_groups``.
      top_groups: groups that a token may use.
      sigmoid: scores are sigmoids with a correction bias, else a softmax.
      normalise: the weights of a token's experts sum to one.
      scale: factor of the routed experts' sum.
      stacked: experts lie along a leading axis, else each has its own subtree.
    """

    num: int
    top_k: int
    size: int
    shared_size: int
    groups: int
    top_groups: int
    sigmoid: bool
    normalise: bool
    scale: float
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


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder's architecture, every default filled in.

    Attributes:
      model_type: the family.
      vocab_size: number of token ids.
      hidden_size: width of the residual stream.
      num_layers: number of layers.
      num_dense: of a mixture of experts, how many first layers are dense.
      num_heads: query heads.
      num_kv_heads: key and value heads.
      head_dim: width of a head.
      mlp_size: inner width of the dense MLP.
      activation: name of the MLP's activation.
      gated: the MLP multiplies an activated and a linear projection.
      norm_eps: epsilon of the norms.
      layer_norm: norms subtract the mean and have biases, else they are RMS norms.
      qk_norm: queries and keys are normalised a head.
      qkv_bias: query, key and value projections have biases.
      out_bias: the attention's output projection has a bias.
      mlp_bias: MLP projections have biases.
      tied: the logits use the embedding.
      positions: number of learned positions; 0 if positions are rotary.
      rope: rotary positions; None if they are learned.
      windows: for each layer the positions that it sees, None for all.
      experts: mixture of experts, if any.
      latent: latent attention, if any.
      std: standard deviation of random weights.
      residual_std: that of the projections that end a residual branch.
      param_dtype: name of the parameters' dtype.
      init_dtype: name of the dtype in which random weights are drawn.
      stacked: layers lie along a leading axis, else each has its own subtree.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_dense: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_size: int
    activation: str
    gated: bool
    norm_eps: float
    layer_norm: bool
    qk_norm: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    tied: bool
    positions: int
    rope: Rope | None
    windows: tuple[int | None, ...]
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
            came = "missing" if family is None else f"{family!r} is unknown"
            fault("model_type", f"{came}; one of {known}{close_to(family, FAMILIES)}")
            family = None
        values = read_values(config, family, fault)
        refuse_unknown(config, family, fault)
        if family is not None:
            result = _resolve(cls, family, values, config, fault)
            if not faults:
                return result
        raise SpecError("decoder", faults)


def _resolve(
    cls: Callable[..., DecoderConfig],
    family: str,
    v: dict[str, Any],
    config: Mapping[str, Any],
    fault: Callable[[str, str], None],
) -> Any:
    """Relations between the keys, then the config; None if a size is missing."""
    gpt2, deepseek = family == "gpt2", family == "deepseek_v3"
    width, heads = v["hidden_size"], v["num_heads"]
    kv_heads = v.get("num_kv_heads") or heads
    head_dim = v.get("head_dim")
    if heads and kv_heads and heads % kv_heads:
        fault("num_key_value_heads", f"{kv_heads} does not divide {heads} query heads")
    if deepseek and heads and kv_heads and kv_heads != heads:
        fault("num_key_value_heads", f"{kv_heads} is not num_attention_heads, {heads}")
    if head_dim is None and not deepseek and width and heads:
        if width % heads:
            field = "n_head" if gpt2 else "num_attention_heads"
            fault(field, f"{heads} does not divide the width {width}")
        head_dim = width // heads
    rotary = v["rope_dim"] if deepseek else head_dim
    field = "qk_rope_head_dim" if deepseek else "head_dim"
    if not gpt2 and rotary and rotary % 2:
        fault(field, f"{rotary} is odd; rotary positions turn pairs")
    if not gpt2 and rotary and rotary > MAX_ROTARY:  # there is a number for each pair
        fault(field, f"{rotary} rotary positions; at most {MAX_ROTARY}")
        rotary = None
    rope = None if gpt2 else read_rope(v, bool(v.get("interleave")), rotary, fault)
    experts = _experts(family, v, fault) if v.get("num_experts") else None
    windows = _windows(family, v, config, fault)
    if not (width and heads and v["num_layers"] and (head_dim or deepseek)):
        return None
    dtype = v["param_dtype"] or v["dtype"] or v["torch_dtype"] or "float32"
    std = v["std"] if v["std"] is not None else 0.0
    latent = None
    if deepseek:
        names = ("q_rank", "kv_rank", "nope_dim", "rope_dim", "v_dim")
        latent = Latent(**{name: v[name] for name in names})
        if v["nope_dim"] and v["rope_dim"]:
            head_dim = v["nope_dim"] + v["rope_dim"]
    return cls(
        model_type=family,
        vocab_size=v["vocab_size"],
        hidden_size=width,
        num_layers=v["num_layers"],
        num_dense=v.get("num_dense") or 0,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        mlp_size=v["mlp_size"] or 4 * width,
        activation=v["activation"],
        gated=not gpt2,
        norm_eps=v["norm_eps"],
        layer_norm=gpt2,
        qk_norm=family == "qwen3",
        qkv_bias=gpt2 or family == "qwen2" or bool(v.get("attention_bias")),
        out_bias=gpt2 or bool(v.get("attention_bias")),
        mlp_bias=gpt2 or bool(v.get("mlp_bias")),
        tied=v["tied"],
        positions=v.get("positions") or 0,
        rope=rope,
        windows=windows,
        experts=experts,
        latent=latent,
        std=std,
        residual_std=std / (2 * v["num_layers"]) ** 0.5 if gpt2 else std,
        param_dtype=dtype,
        init_dtype=v["init_dtype"],
        stacked=v["layer_layout"] == "stacked",
    )


def _experts(
    family: str, v: dict[str, Any], fault: Callable[[str, str], None]
) -> Experts | None:
    num, top_k = v["num_experts"], v["top_k"]
    deepseek = family == "deepseek_v3"
    size = v["expert_size"] if deepseek else v["mlp_size"]
    groups, top_groups = v.get("groups") or 1, v.get("top_groups") or 1
    name = "n_routed_experts" if deepseek else "num_local_experts"
    if num and top_k and top_k > num:
        fault("num_experts_per_tok", f"{top_k} is more than {name}, {num}")
    if num % groups:
        fault("n_group", f"{groups} does not divide {name}, {num}")
    elif top_groups > groups:
        fault("topk_group", f"{top_groups} is more than n_group, {groups}")
    elif top_k and num >= top_k > num // groups * top_groups:
        fault("topk_group", f"{top_groups} groups hold fewer than {top_k} experts")
    elif groups > 1 and num // groups < 2:
        fault("n_group", f"{groups} groups have one expert each; a group needs two")
    dense, layers = v.get("num_dense"), v["num_layers"]
    if dense and layers and dense > layers:
        fault("first_k_dense_replace", f"{dense} is more than the {layers} layers")
    if not (num and top_k and size):
        return None
    return Experts(
        num=num,
        top_k=top_k,
        size=size,
        shared_size=(v.get("num_shared") or 0) * size,
        groups=groups,
        top_groups=top_groups,
        sigmoid=deepseek,
        normalise=bool(v.get("normalise", True)),
        scale=v["scale"] if v.get("scale") is not None else 1.0,
        stacked=v["expert_layout"] == "stacked",
    )


def _windows(
    family: str,
    v: dict[str, Any],
    config: Mapping[str, Any],
    fault: Callable[[str, str], None],
) -> tuple[int | None, ...]:
    layers, window, types = v["num_layers"] or 0, v.get("window"), v.get("layer_types")
    if family in ("qwen2", "qwen3") and not v["use_window"]:
        window = None
    if types is None:
        first = v.get("full_layers") or 0
        return tuple(window if i >= first else None for i in range(layers))
    choices = ("full_attention", "sliding_attention")
    for i, kind in enumerate(types):
        if kind not in choices:
            fault(f"layer_types[{i}]", f"{kind!r} is not one of {', '.join(choices)}")
    if layers and len(types) != layers:
        fault("layer_types", f"{len(types)} entries for {layers} layers")
    if "sliding_attention" in types and window is None:
        fault("layer_types", "sliding_attention without a sliding_window")
    return tuple(window if kind == choices[1] else None for kind in types)
