"""Hugging Face's names for the decoders of the registry, and their ``config.json``.

Each family is a text in the language of ``core.run.renames``: the leaves of the layers
that are unrolled, each a subtree of its own. Stacked layers and experts are the same
lines with an axis in the place of a key, which ``lines_for`` writes.

The names are those of published checkpoints, which every release of ``transformers``
loads; where a release fuses experts in memory, it does so as it loads.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shardinit.core.run.renames import Rename, renames
from shardinit.errors import CheckpointError

CONFIG = "config.json"

_ENDS = """
embed/embedding -> model.embed_tokens.weight
norm/scale -> model.norm.weight
lm_head/kernel -> lm_head.weight : transpose
layers/{l}/attention_norm/scale -> model.layers.{l}.input_layernorm.weight
layers/{l}/mlp_norm/scale -> model.layers.{l}.post_attention_layernorm.weight
layers/{l}/mlp/{x}/kernel -> model.layers.{l}.mlp.{x}_proj.weight : transpose
layers/{l}/mlp/{x}/bias -> model.layers.{l}.mlp.{x}_proj.bias
layers/{l}/attention/o/kernel -> model.layers.{l}.self_attn.o_proj.weight : transpose 2
layers/{l}/attention/o/bias -> model.layers.{l}.self_attn.o_proj.bias
"""

_LLAMA = f"""{_ENDS}
layers/{{l}}/attention/{{x}}_norm/scale -> model.layers.{{l}}.self_attn.{{x}}_norm.weight
layers/{{l}}/attention/{{x}}/kernel -> model.layers.{{l}}.self_attn.{{x}}_proj.weight : transpose
layers/{{l}}/attention/{{x}}/bias -> model.layers.{{l}}.self_attn.{{x}}_proj.bias : flatten
"""  # noqa: E501

_MIXTRAL = f"""{_LLAMA}
layers/{{l}}/moe/router/kernel -> model.layers.{{l}}.block_sparse_moe.gate.weight : transpose
layers/{{l}}/moe/experts/{{e}}/gate -> model.layers.{{l}}.block_sparse_moe.experts.{{e}}.w1.weight : transpose
layers/{{l}}/moe/experts/{{e}}/down -> model.layers.{{l}}.block_sparse_moe.experts.{{e}}.w2.weight : transpose
layers/{{l}}/moe/experts/{{e}}/up -> model.layers.{{l}}.block_sparse_moe.experts.{{e}}.w3.weight : transpose
"""  # noqa: E501

_DEEPSEEK = f"""{_ENDS}
layers/{{l}}/attention/q/kernel -> model.layers.{{l}}.self_attn.q_proj.weight : transpose
layers/{{l}}/attention/q_a/kernel -> model.layers.{{l}}.self_attn.q_a_proj.weight : transpose
layers/{{l}}/attention/q_a/bias -> model.layers.{{l}}.self_attn.q_a_proj.bias
layers/{{l}}/attention/kv_a/kernel -> model.layers.{{l}}.self_attn.kv_a_proj_with_mqa.weight : transpose
layers/{{l}}/attention/kv_a/bias -> model.layers.{{l}}.self_attn.kv_a_proj_with_mqa.bias
layers/{{l}}/attention/{{x}}_norm/scale -> model.layers.{{l}}.self_attn.{{x}}_a_layernorm.weight
layers/{{l}}/attention/{{x}}_b/kernel -> model.layers.{{l}}.self_attn.{{x}}_b_proj.weight : transpose
layers/{{l}}/moe/router/kernel -> model.layers.{{l}}.mlp.gate.weight : transpose
layers/{{l}}/moe/router_bias -> model.layers.{{l}}.mlp.gate.e_score_correction_bias
layers/{{l}}/moe/experts/{{e}}/{{x}} -> model.layers.{{l}}.mlp.experts.{{e}}.{{x}}_proj.weight : transpose
layers/{{l}}/moe/shared/{{x}}/kernel -> model.layers.{{l}}.mlp.shared_experts.{{x}}_proj.weight : transpose
"""  # noqa: E501

# Its projections are kept as (inputs, outputs), as ours are: nothing is swapped.
_GPT2 = """
embed/embedding -> transformer.wte.weight
positions/embedding -> transformer.wpe.weight
norm/scale -> transformer.ln_f.weight
norm/bias -> transformer.ln_f.bias
lm_head/kernel -> lm_head.weight : transpose
layers/{l}/attention_norm/scale -> transformer.h.{l}.ln_1.weight
layers/{l}/attention_norm/bias -> transformer.h.{l}.ln_1.bias
layers/{l}/mlp_norm/scale -> transformer.h.{l}.ln_2.weight
layers/{l}/mlp_norm/bias -> transformer.h.{l}.ln_2.bias
layers/{l}/attention/q/kernel -> transformer.h.{l}.attn.c_attn.weight : flatten 1,fuse 1
layers/{l}/attention/k/kernel -> transformer.h.{l}.attn.c_attn.weight : flatten 1,fuse 1
layers/{l}/attention/v/kernel -> transformer.h.{l}.attn.c_attn.weight : flatten 1,fuse 1
layers/{l}/attention/q/bias -> transformer.h.{l}.attn.c_attn.bias : flatten, fuse
layers/{l}/attention/k/bias -> transformer.h.{l}.attn.c_attn.bias : flatten, fuse
layers/{l}/attention/v/bias -> transformer.h.{l}.attn.c_attn.bias : flatten, fuse
layers/{l}/attention/o/kernel -> transformer.h.{l}.attn.c_proj.weight : flatten 2
layers/{l}/attention/o/bias -> transformer.h.{l}.attn.c_proj.bias
layers/{l}/mlp/up/kernel -> transformer.h.{l}.mlp.c_fc.weight
layers/{l}/mlp/up/bias -> transformer.h.{l}.mlp.c_fc.bias
layers/{l}/mlp/down/kernel -> transformer.h.{l}.mlp.c_proj.weight
layers/{l}/mlp/down/bias -> transformer.h.{l}.mlp.c_proj.bias
"""

_FAMILIES = {
    "llama": (_LLAMA, "LlamaForCausalLM"),
    "mistral": (_LLAMA, "MistralForCausalLM"),
    "qwen2": (_LLAMA, "Qwen2ForCausalLM"),
    "qwen3": (_LLAMA, "Qwen3ForCausalLM"),
    "mixtral": (_MIXTRAL, "MixtralForCausalLM"),
    "gpt2": (_GPT2, "GPT2LMHeadModel"),
    "deepseek_v3": (_DEEPSEEK, "DeepseekV3ForCausalLM"),
}

# Keys that only shardinit's decoder has.
_OWN = ("param_dtype", "init_dtype", "layer_layout", "expert_layout", "torch_dtype")

# What published checkpoints carry and transformers does not load either: masks and
# frequencies that are computed, and DeepSeek's layers that predict further tokens.
_IDLE = ("**.attn.bias", "**.attn.masked_bias", "**.rotary_emb.inv_freq")


def lines_for(
    config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]
) -> tuple[Rename, ...]:
    """The renames from a decoder's leaves to Hugging Face's names.

    Args:
      config: a ``config.json``; its ``model_type`` says the family.
      shapes: the leaves' shapes by path, which say whether layers are stacked.

    Raises:
      CheckpointError: a family that has no names here.

    Example:
      >>> from shardinit.storage import hf
      >>> lines = hf.lines_for({"model_type": "gpt2"}, {"embed/embedding": (8, 4)})
      >>> lines[0].targets
      ('transformer.wte.weight',)
    """
    family = config.get("model_type")
    if family not in _FAMILIES:
        raise CheckpointError(
            'names="hf"',
            f"model_type {family!r}",
            "one of " + ", ".join(_FAMILIES),
            "Say the names of another model a line each: names='leaf -> tensor'",
        )
    text, _ = _FAMILIES[family]
    lines = [line for line in text.splitlines() if line]
    if _are_stacked(shapes, "experts/gate"):
        lines = [_stacked(line, "experts/{e}/", "experts/") for line in lines]
    if _are_stacked(shapes, "layers/attention_norm"):
        first = next((n for p, (n, *_) in shapes.items() if p[:6] == "dense_"), 0)
        dense = [_stacked(line, "layers/{l}/", "dense_layers/") for line in lines]
        lines = [_stacked_layer(line, first) for line in lines]
        lines += dense if first else []
    return renames(lines)


def _stacked_layer(line: str, first: int) -> str:
    """A line of one layer as one of all layers from the first that is not dense."""
    if not line.startswith("layers/"):
        return line
    stacked = _stacked(line, "layers/{l}/", "layers/")
    return stacked.replace(".{l}.", f".{{l+{first}}}.")


def _are_stacked(shapes: Iterable[str], path: str) -> bool:
    """Whether a path is there without a key for one of several: they have an axis."""
    return any(f"/{path}" in f"/{leaf}".replace("dense_", "") for leaf in shapes)


def _stacked(line: str, unrolled: str, stacked: str) -> str:
    """The line of leaves that have an axis in the place of a key."""
    source, arrow, rest = line.partition("->")
    if unrolled not in source:
        return line
    rest = rest if " : " in rest else f"{rest} : "
    words = rest if "unstack" in rest else rest.replace(" : ", " : unstack, ")
    return source.replace(unrolled, stacked) + arrow + words.rstrip(", ")


def idle(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Globs of tensors in published checkpoints that are no parameters."""
    more = ()
    if config.get("model_type") == "deepseek_v3":
        more = (f"model.layers.{config['num_hidden_layers']}.**",)
    return (*_IDLE, *more)


def read_config(given: Any) -> dict[str, Any]:
    """A configuration as a dict.

    Args:
      given: a mapping, a ``ModelSpec``, a configuration of ``transformers``, a file, or
        a folder that has a ``config.json``.

    Raises:
      CheckpointError: it is none of these.

    Example:
      >>> from shardinit.storage import hf
      >>> hf.read_config({"model_type": "gpt2"})
      {'model_type': 'gpt2'}
    """
    if isinstance(given, str | os.PathLike):
        path = Path(given)
        path = path / CONFIG if path.is_dir() else path
        try:
            return dict(json.loads(path.read_bytes()))
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(
                f"config {str(path)!r}", f"it cannot be read ({error})"
            ) from error
    if isinstance(getattr(given, "config", None), Mapping):  # a ModelSpec
        given = given.config
    elif hasattr(given, "to_dict"):  # a configuration of transformers
        given = given.to_dict()
    if not isinstance(given, Mapping):
        raise CheckpointError(
            "config=",
            f"got {type(given).__name__}",
            "a mapping, a ModelSpec, a configuration of transformers, or a file",
        )
    return dict(given)


def config_json(config: Mapping[str, Any], dtypes: Iterable[Any]) -> str:
    """The text of the ``config.json`` that goes with the tensors.

    Args:
      config: what describes the model; its own keys of the decoder are left out.
      dtypes: of the leaves; the most frequent one is the model's.
    """
    names = [np.dtype(dtype).name for dtype in dtypes]
    dtype = max(dict.fromkeys(names), key=names.count)
    known = _FAMILIES.get(config.get("model_type", ""))
    made = {key: value for key, value in config.items() if key not in _OWN}
    if known is not None:
        made.setdefault("architectures", [known[1]])
    made["dtype"] = dtype
    return json.dumps(made, indent=2, sort_keys=True) + "\n"
