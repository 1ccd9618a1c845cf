"""Rotary positions: each pair of a head's dimensions turns at its own frequency.

The frequencies fall geometrically from 1 to ``1 / theta`` radians a position. Models
that were trained on short texts and continued on long ones bend that curve: *linear*
slows every frequency; *llama3* slows only those whose period is longer than the
original context, with a smooth passage; *yarn* does so between two counts of turns
and sharpens the attention a little. All of it is decided before the first token, so
the frequencies are computed once, on the host, from numbers of the config.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

# For each kind of scaling: its numbers, with defaults (None: must be given).
_KINDS: dict[str, dict[str, float | None]] = {
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


@dataclass(frozen=True)
class Rope:
    """Rotary positions of one model.

    Attributes:
      frequencies: radians a position, one for each pair of dimensions.
      magnitude: factor of the rotated vectors.
      softmax: factor of the attention's logits, besides the usual one.
      interleave: pairs are neighbours, else the halves of the head.
    """

    frequencies: tuple[float, ...]
    magnitude: float = 1.0
    softmax: float = 1.0
    interleave: bool = False


def read_rope(
    values: Mapping[str, Any],
    interleave: bool,
    dim: int | None,
    fault: Callable[[str, str], None],
) -> Rope | None:
    """Reads ``rope_theta`` with ``rope_scaling``, or ``rope_parameters``.

    Args:
      values: the config's values by field.
      interleave: whether pairs are neighbours.
      dim: rotary dimensions of a head, if known.
      fault: called with field and description of each fault.

    Returns:
      The rotary positions, or None where they cannot be known.
    """
    field = "rope_parameters" if values["rope_parameters"] else "rope_scaling"
    given = dict(values[field] or {})
    theta = given.pop("rope_theta", values["rope_theta"])
    kind = given.pop("rope_type", None) or given.pop("type", None) or "default"
    given.pop("type", None)
    if kind not in _KINDS:
        known = ", ".join(_KINDS)
        fault(f"{field}.rope_type", f"{kind!r} is not supported; one of {known}")
        return None
    if given.pop("partial_rotary_factor", 1) != 1:
        fault(f"{field}.partial_rotary_factor", "only 1 is supported")
    numbers: dict[str, float] = {}
    for name, default in _KINDS[kind].items():
        value = given.pop(name, None)
        value = default if value is None else value
        if value is None:
            fault(f"{field}.{name}", f"missing; {kind} needs it")
        elif isinstance(value, bool) or not isinstance(value, int | float):
            fault(f"{field}.{name}", f"{value!r} is no number")
        elif value <= 0 and default is None:
            fault(f"{field}.{name}", f"{value} is not above 0")
        else:
            numbers[name] = float(value)
    for name in given:
        fault(f"{field}.{name}", f"no number of {kind}")
    if isinstance(theta, bool) or not isinstance(theta, int | float) or theta < 1:
        if theta is not None:
            fault(f"{field}.rope_theta", f"{theta!r} is no number of at least 1")
        return None
    if not dim or len(numbers) < len(_KINDS[kind]):
        return None
    plain = [theta ** (-2 * i / dim) for i in range(dim // 2)]
    if kind == "yarn":
        return _yarn(plain, theta, dim, numbers, interleave)
    if kind == "llama3":
        plain = [_llama3(f, numbers) for f in plain]
    elif kind == "linear":
        plain = [f / numbers["factor"] for f in plain]
    return Rope(tuple(plain), interleave=interleave)


def _llama3(frequency: float, n: Mapping[str, float]) -> float:
    turns = n["original_max_position_embeddings"] * frequency / (2 * math.pi)
    low, high = n["low_freq_factor"], n["high_freq_factor"]
    if turns > high:
        return frequency
    if turns < low:
        return frequency / n["factor"]
    smooth = (turns - low) / (high - low)
    return (1 - smooth) * frequency / n["factor"] + smooth * frequency


def _yarn(
    plain: list[float], theta: float, dim: int, n: Mapping[str, float], interleave: bool
) -> Rope:
    def pair_of(turns: float) -> float:
        # the pair that turns so many times over the original context
        context = n["original_max_position_embeddings"]
        return dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    def sharpen(scale: float) -> float:
        return 0.1 * scale * math.log(n["factor"]) + 1 if n["factor"] > 1 else 1.0

    low = max(math.floor(pair_of(n["beta_fast"])), 0)
    high = min(math.ceil(pair_of(n["beta_slow"])), dim - 1)
    bent = []
    for i, frequency in enumerate(plain):
        slow = min(max((i - low) / (high - low or 0.001), 0.0), 1.0)
        bent.append(frequency / n["factor"] * slow + frequency * (1 - slow))
    magnitude = n["attention_factor"]
    if not magnitude and n["mscale"] and n["mscale_all_dim"]:
        magnitude = sharpen(n["mscale"]) / sharpen(n["mscale_all_dim"])
    softmax = sharpen(n["mscale_all_dim"]) ** 2 if n["mscale_all_dim"] else 1.0
    return Rope(tuple(bent), magnitude or sharpen(1), softmax, interleave)
