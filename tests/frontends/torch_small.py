"""One rule that makes any configuration of transformers small."""

import json
import re

_LAYERS = re.compile(
    r"(^|_)(n_layers?|num_layers|num_hidden_layers|layers|depth|n_blocks|num_blocks"
    r"|n_head_layers|num_.*_layers)$|_layers$"
)
_WIDTHS = re.compile(
    r"(^|_)(size|dim|width|rank|channels|d_model|d_ff|d_kv|n_embd|n_inner|features"
    r"|embd|dims|hidden|filters|ffn|units|dimension|sizes)(_|$)|^d_"
)
_KEPT = re.compile(
    r"patch|kernel|image|vocab|window|conv|chunk|stride|pool|block|type|head_count"
    r"|num_heads|block_size|max_|crop|n_mels|num_mel|group"
)
_EXPERTS = re.compile(r"experts$|n_routed_experts|num_local_experts")
_TOP = re.compile(r"per_tok$|top_?k$|_topk$")
_SMALL = {"vocab": 512, "position": 256, "experts": 4, "top": 2}


def _shrunk(name, value, factor, deep, layers):
    if isinstance(value, dict):
        if set(value) == {"__float__"}:
            return float(value["__float__"])
        return small(value, factor, deep)
    if isinstance(value, list):
        if value and len(value) in layers:
            value = value[:deep]
        return [_shrunk(name, item, factor, deep, layers) for item in value]
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    if "vocab" in name or name.endswith("token_id"):
        return min(value, _SMALL["vocab"] - ("vocab" not in name))
    if "position" in name:
        return min(value, _SMALL["position"])
    if _EXPERTS.search(name):
        return min(value, _SMALL["experts"])
    if _TOP.search(name):
        return min(value, _SMALL["top"])
    if _LAYERS.search(name):
        return min(value, deep)
    if _WIDTHS.search(name) and not _KEPT.search(name) and value % factor == 0:
        return max(value // factor, 1)
    return value


def small(config, factor=16, deep=2):
    """The content of a ``config.json`` with few layers, narrow ones, and few experts.

    Widths are divided by one factor, so that heads still divide them; what is said for
    each of the layers is said for the first of them.
    """
    layers = {
        value
        for name, value in config.items()
        if _LAYERS.search(name) and isinstance(value, int) and value > deep
    }
    made = {
        name: _shrunk(name, value, factor, deep, layers)
        for name, value in config.items()
        if not (name.isdigit() and int(name) >= deep)
    }
    if "is_decoder" in made and not made.get("is_encoder_decoder"):
        made["is_decoder"] = True
    if made.get("head_dim", 0) is None and made.get("num_attention_heads"):
        made["head_dim"] = made["hidden_size"] // made["num_attention_heads"]
    return made


def plain(config):
    """The content of a configuration of transformers, as its file has it."""
    return json.loads(config.to_json_string(use_diff=False))
