"""Checks of a config's keys against one another.

Each function looks at one relation, with whatever values are there: a missing or
faulty one has been reported by its own check and is None here. What only a forward
pass would use (rotary positions, windows, the choice of experts) is checked all the
same: whoever writes a spec that no such model can have hears it now.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shardinit.models.checks import Fault

# No head in use has a hundredth of it: a mistyped width is refused by its field,
# before it is the shape of a leaf.
MAX_ROTARY = 1 << 16

# For each kind of rotary scaling: its numbers, with defaults (None: must be given).
_ROPE: dict[str, dict[str, float | None]] = {
    "default": {},
    "linear": {"factor": None},
    "llama3": {
        "factor": None,
        "low_freq_factor": None,
        "high_freq_factor": None,
        "original_max_position_embeddings": None,
    },
    "yarn": {
        "factor": None,
        "original_max_position_embeddings": None,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 0.0,
        "mscale_all_dim": 0.0,
        "attention_factor": 0.0,
    },
}

_LAYER_TYPES = ("full_attention", "sliding_attention")


def check_relations(family: str, values: Mapping[str, Any], fault: Fault) -> None:
    """Reports every relation between the keys that does not hold.

    Args:
      family: the model type.
      values: the values by field, as `read_values` returns them.
      fault: called with field and description of each fault.
    """
    _check_heads(family, values, fault)
    if family != "gpt2":
        _check_rotary(family, values, fault)
        _check_rope_scaling(values, fault)
    if values.get("num_experts"):
        _check_experts(family, values, fault)
        _check_groups(family, values, fault)
        _check_dense(values, fault)
    _check_layer_types(values, fault)


def _check_heads(family: str, v: Mapping[str, Any], fault: Fault) -> None:
    width, heads = v["hidden_size"], v["num_heads"]
    if not heads:
        return
    kv_heads = v.get("num_kv_heads") or heads
    if heads % kv_heads:
        fault("num_key_value_heads", f"{kv_heads} does not divide {heads} query heads")
    if family == "deepseek_v3":
        if kv_heads != heads:
            text = f"{kv_heads} is not num_attention_heads, {heads}"
            fault("num_key_value_heads", text)
    elif v.get("head_dim") is None and width and width % heads:
        field = "n_head" if family == "gpt2" else "num_attention_heads"
        fault(field, f"{heads} does not divide the width {width}")


def _check_rotary(family: str, v: Mapping[str, Any], fault: Fault) -> None:
    field, size = "head_dim", v.get("head_dim")
    if family == "deepseek_v3":
        field, size = "qk_rope_head_dim", v["rope_dim"]
    elif size is None and v["hidden_size"] and v["num_heads"]:
        size = v["hidden_size"] // v["num_heads"]
    if size and size % 2:
        fault(field, f"{size} is odd; rotary positions turn pairs")
    if size and size > MAX_ROTARY:
        fault(field, f"{size} rotary positions; at most {MAX_ROTARY}")


def _check_rope_scaling(v: Mapping[str, Any], fault: Fault) -> None:
    field = "rope_parameters" if v["rope_parameters"] else "rope_scaling"
    given = dict(v[field] or {})
    theta = given.pop("rope_theta", v["rope_theta"])
    old, new = given.pop("type", None), given.pop("rope_type", None)
    kind = new or old or "default"
    if kind not in _ROPE:
        known = ", ".join(_ROPE)
        fault(f"{field}.rope_type", f"{kind!r} is not supported; one of {known}")
        return
    if given.pop("partial_rotary_factor", 1) != 1:
        fault(f"{field}.partial_rotary_factor", "only 1 is supported")
    for name, default in _ROPE[kind].items():
        _check_number(f"{field}.{name}", given.pop(name, None), default, kind, fault)
    for name in given:
        fault(f"{field}.{name}", f"no number of {kind}")
    if theta is not None and not (_is_number(theta) and theta >= 1):
        fault(f"{field}.rope_theta", f"{theta!r} is no number of at least 1")


def _check_number(
    field: str, value: Any, default: float | None, kind: str, fault: Fault
) -> None:
    value = default if value is None else value
    if value is None:
        fault(field, f"missing; {kind} needs it")
    elif not _is_number(value):
        fault(field, f"{value!r} is no number")
    elif value <= 0 and default is None:
        fault(field, f"{value} is not above 0")


def _is_number(value: Any) -> bool:
    # JSON's true is a bool, and to Python an int.
    return isinstance(value, int | float) and not isinstance(value, bool)


def _experts_key(family: str) -> str:
    return "n_routed_experts" if family == "deepseek_v3" else "num_local_experts"


def _check_experts(family: str, v: Mapping[str, Any], fault: Fault) -> None:
    num, top_k = v["num_experts"], v["top_k"]
    if top_k and top_k > num:
        text = f"{top_k} is more than {_experts_key(family)}, {num}"
        fault("num_experts_per_tok", text)


def _check_groups(family: str, v: Mapping[str, Any], fault: Fault) -> None:
    num, top_k = v["num_experts"], v["top_k"]
    groups, top_groups = v.get("groups") or 1, v.get("top_groups") or 1
    if num % groups:
        fault("n_group", f"{groups} does not divide {_experts_key(family)}, {num}")
    elif top_groups > groups:
        fault("topk_group", f"{top_groups} is more than n_group, {groups}")
    elif top_k and num >= top_k > num // groups * top_groups:
        fault("topk_group", f"{top_groups} groups hold fewer than {top_k} experts")
    elif groups > 1 and num // groups < 2:
        fault("n_group", f"{groups} groups have one expert each; a group needs two")


def _check_dense(v: Mapping[str, Any], fault: Fault) -> None:
    dense, layers = v.get("num_dense"), v["num_layers"]
    if dense and layers and dense > layers:
        fault("first_k_dense_replace", f"{dense} is more than the {layers} layers")


def _check_layer_types(v: Mapping[str, Any], fault: Fault) -> None:
    types, layers = v.get("layer_types"), v["num_layers"]
    if types is None:
        return
    for i, kind in enumerate(types):
        if kind not in _LAYER_TYPES:
            known = ", ".join(_LAYER_TYPES)
            fault(f"layer_types[{i}]", f"{kind!r} is not one of {known}")
    if layers and len(types) != layers:
        fault("layer_types", f"{len(types)} entries for {layers} layers")
    window = v.get("window") if v.get("use_window", True) else None
    if "sliding_attention" in types and window is None:
        fault("layer_types", "sliding_attention without a sliding_window")
