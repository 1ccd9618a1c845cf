"""The keys of a decoder's config: the vocabulary of Hugging Face's ``config.json``.

One table says of every key what it means, what type it has, which model types have it
and what it is when left out (as the family's own configuration class has it). From
this table come the schema that a service lists, the checks of `DecoderConfig`, and
the suggestion for a misspelt key. Keys that a published config carries for other
purposes (tokens, training, caching, quantised weights) are known too, as ignored; a
key in neither place is a fault, because a misspelt key that is silently ignored gives
another model than the one that was asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

FAMILIES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "mixtral",
    "gpt2",
    "deepseek_v3",
)

REQUIRED = object()
"""Stands where a default would: the key must be there."""

DTYPES = ("float32", "bfloat16", "float16")
ACTIVATIONS = ("silu", "gelu", "gelu_new", "relu")


@dataclass(frozen=True)
class Key:
    """One key of the config.

    Attributes:
      name: the key.
      field: what families call differently, by one name (mostly that of
        `DecoderConfig`).
      type: JSON type: integer, number, boolean, string, object or array.
      text: what it means, with units where there are any.
      families: the model types that have it.
      default: its value when left out or null; `REQUIRED` if it must be there.
      least: smallest value allowed, for numbers.
      choices: the values allowed, for strings.
      nullable: null is a value of its own, not an omission.
    """

    name: str
    field: str
    type: str
    text: str
    families: tuple[str, ...] = FAMILIES
    default: Any = None
    least: float | None = None
    choices: tuple[str, ...] = ()
    nullable: bool = False


_ROTARY = tuple(f for f in FAMILIES if f != "gpt2")
_GROUPED = tuple(f for f in _ROTARY if f != "deepseek_v3")
_BIASED = ("llama", "qwen3", "deepseek_v3")
_SLIDING = ("mistral", "mixtral", "qwen2", "qwen3")
_QWEN = ("qwen2", "qwen3")
_MOE = ("mixtral", "deepseek_v3")
_DEEPSEEK = ("deepseek_v3",)


def _size(name: str, field: str, text: str, families: tuple, **more: Any) -> Key:
    return Key(
        name, field, "integer", text, families, **{"default": REQUIRED, **more}, least=1
    )


def _sizes() -> list[Key]:
    rows = [
        ("hidden_size", "n_embd", "hidden_size", "width of the residual stream"),
        ("num_hidden_layers", "n_layer", "num_layers", "number of layers"),
        ("num_attention_heads", "n_head", "num_heads", "number of query heads"),
    ]
    keys = [_size("vocab_size", "vocab_size", "number of token ids", FAMILIES)]
    for name, gpt2, field, text in rows:
        keys.append(_size(name, field, text, _ROTARY))
        keys.append(_size(gpt2, field, text, ("gpt2",)))
    return [
        *keys,
        _size("intermediate_size", "mlp_size", "inner width of the MLP", _ROTARY),
        _size("n_inner", "mlp_size", "inner width of the MLP; 4 n_embd if left out",
              ("gpt2",), default=None),
        _size("n_positions", "positions", "number of learned positions", ("gpt2",)),
        _size("num_key_value_heads", "num_kv_heads", "key and value heads; as many as "
              "query heads if left out", _ROTARY, default=None),
        _size("head_dim", "head_dim", "width of a head; hidden_size divided by the "
              "heads if left out (qwen3: 128)", _GROUPED, default=None),
        _size("sliding_window", "window", "positions that a sliding layer sees",
              _SLIDING, default=None, nullable=True),
        Key("max_window_layers", "full_layers", "integer", "layers from this one on "
            "slide", _QWEN, 28, 0),
    ]  # fmt: skip


def _options() -> list[Key]:
    return [
        Key("hidden_act", "activation", "string", "activation of the MLP", _ROTARY,
            "silu", choices=ACTIVATIONS),
        Key("activation_function", "activation", "string", "activation of the MLP",
            ("gpt2",), "gelu_new", choices=ACTIVATIONS),
        Key("rms_norm_eps", "norm_eps", "number", "added to the mean square", _ROTARY,
            1e-6, 0),
        Key("layer_norm_epsilon", "norm_eps", "number", "added to the variance",
            ("gpt2",), 1e-5, 0),
        Key("attention_bias", "attention_bias", "boolean", "attention projections have "
            "biases", _BIASED, False),
        Key("mlp_bias", "mlp_bias", "boolean", "MLP projections have biases",
            ("llama",), False),
        Key("tie_word_embeddings", "tied", "boolean", "the logits use the embedding; "
            "true for gpt2 if left out", default=False),
        Key("use_sliding_window", "use_window", "boolean", "some layers slide", _QWEN,
            False),
        Key("layer_types", "layer_types", "array", "full_attention or "
            "sliding_attention, a layer", _SLIDING),
        Key("rope_theta", "rope_theta", "number", "base of the rotary frequencies",
            _ROTARY, 10000.0, 1),
        Key("rope_scaling", "rope_scaling", "object", "rope_type default, linear, "
            "llama3 or yarn, and its numbers", _ROTARY),
        Key("rope_parameters", "rope_parameters", "object", "rope_theta and "
            "rope_scaling in one", _ROTARY),
        Key("initializer_range", "std", "number", "standard deviation of weights",
            default=0.02, least=0),
        Key("param_dtype", "param_dtype", "string", "dtype of the parameters; else "
            "dtype, torch_dtype, float32", choices=DTYPES),
        Key("dtype", "dtype", "string", "see param_dtype", choices=DTYPES),
        Key("torch_dtype", "torch_dtype", "string", "see param_dtype", choices=DTYPES),
        Key("init_dtype", "init_dtype", "string", "dtype in which random weights are "
            "drawn, then cast; a bfloat16 draw has 128 values and a mean of -0.012 "
            "standard deviations", default="float32", choices=DTYPES),
        Key("layer_layout", "layer_layout", "string", "unrolled: a subtree a layer; "
            "stacked: layers along a leading axis", default="unrolled",
            choices=("unrolled", "stacked")),
        Key("expert_layout", "expert_layout", "string", "stacked: experts along a "
            "leading axis; unrolled: a subtree an expert", _MOE, "stacked",
            choices=("stacked", "unrolled")),
    ]  # fmt: skip


def _experts() -> list[Key]:
    return [
        _size("num_local_experts", "num_experts", "number of experts", ("mixtral",)),
        _size("n_routed_experts", "num_experts", "number of routed experts", _DEEPSEEK),
        _size("num_experts_per_tok", "top_k", "experts that a token uses", _MOE),
        _size("moe_intermediate_size", "expert_size", "inner width of an expert",
              _DEEPSEEK),
        Key("n_shared_experts", "num_shared", "integer", "experts that all tokens use",
            _DEEPSEEK, 1, 0),
        Key("first_k_dense_replace", "num_dense", "integer", "first layers with a "
            "dense MLP", _DEEPSEEK, REQUIRED, 0),
        Key("n_group", "groups", "integer", "groups of experts", _DEEPSEEK, 1, 1),
        Key("topk_group", "top_groups", "integer", "groups that a token may use",
            _DEEPSEEK, 1, 1),
        Key("norm_topk_prob", "normalise", "boolean", "weights of a token's experts "
            "sum to one", _DEEPSEEK, True),
        Key("routed_scaling_factor", "scale", "number", "factor of the routed "
            "experts' sum", _DEEPSEEK, 2.5, 0),
        _size("q_lora_rank", "q_rank", "rank of the queries; null: not compressed",
              _DEEPSEEK, nullable=True),
        _size("kv_lora_rank", "kv_rank", "rank of the keys and values", _DEEPSEEK),
        _size("qk_nope_head_dim", "nope_dim", "part of a head without position",
              _DEEPSEEK),
        _size("qk_rope_head_dim", "rope_dim", "part of a head with rotary position",
              _DEEPSEEK),
        _size("v_head_dim", "v_dim", "width of a value head", _DEEPSEEK),
        Key("rope_interleave", "interleave", "boolean", "rotated pairs are neighbours",
            _DEEPSEEK, True),
    ]  # fmt: skip


KEYS: tuple[Key, ...] = (*_sizes(), *_options(), *_experts())

# Where a family's own default is another than the table's.
DEFAULTS: dict[str, dict[str, Any]] = {
    "gpt2": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 4096},
    "mixtral": {"rms_norm_eps": 1e-5, "rope_theta": 1e6},
    "qwen2": {"sliding_window": 4096},
    "qwen3": {"sliding_window": 4096, "head_dim": 128},
}

# Keys whose other values belong to another architecture.
FIXED: dict[str, tuple[Any, ...]] = {
    "moe_layer_freq": (1,),
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "is_encoder_decoder": (False,),
    "use_mrope": (False,),
}

# Of no consequence for the architecture or its initial values.
_IGNORED = """
    _name_or_path architectures attention_dropout attn_pdrop auto_map aux_loss_alpha
    bos_token_id chunk_size_feed_forward embd_pdrop eos_token_id ep_size
    gradient_checkpointing id2label is_decoder label2id max_length
    max_position_embeddings n_ctx num_mtp_layers num_nextn_predict_layers
    output_attentions output_hidden_states output_router_logits pad_token_id
    pretraining_tp problem_type qk_head_dim quantization_config reorder_and_upcast_attn
    resid_pdrop return_dict router_aux_loss_coef router_jitter_noise seq_aux
    summary_activation summary_first_dropout summary_proj_to_labels summary_type
    summary_use_proj task_specific_params tokenizer_class transformers_version
    use_cache
"""
IGNORED = frozenset(_IGNORED.split())


def known_names(family: str | None) -> tuple[str, ...]:
    """Every key that a config of ``family`` (or of any, if None) may have."""
    keys = (k.name for k in KEYS if family is None or family in k.families)
    return ("model_type", *keys, *FIXED, *sorted(IGNORED))


def schema() -> dict[str, Any]:
    """The config keys in the manner of JSON Schema, for lists of models."""
    properties: dict[str, Any] = {
        "model_type": {
            "type": "string",
            "description": "family of the architecture",
            "enum": list(FAMILIES),
        }
    }
    for key in KEYS:
        entry: dict[str, Any] = {"type": key.type, "description": key.text}
        if key.default is not REQUIRED and key.default is not None:
            entry["default"] = key.default
        if key.least is not None:
            entry["minimum"] = key.least
        if key.choices:
            entry["enum"] = list(key.choices)
        if key.families != FAMILIES:
            entry["modelTypes"] = list(key.families)
        if key.default is REQUIRED:
            entry["requiredFor"] = list(key.families)
        properties[key.name] = entry
    return {
        "type": "object",
        "properties": properties,
        "required": ["model_type", "vocab_size"],
    }
