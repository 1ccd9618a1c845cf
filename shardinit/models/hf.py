"""Any model of Hugging Face's ``transformers``, by its ``config.json``.

The configuration is a stranger's: it can name a class of ``transformers`` and nothing
else. No path is read, no hub is asked and no code but that of ``transformers`` is run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from shardinit.errors import MissingFrameworkError, ShardinitError, SpecError
from shardinit.models.registry import register

if TYPE_CHECKING:
    from shardinit.core.init_fn import InitFn

_TEXT = {"type": ["string", "null"], "default": None}
_SCHEMA = {
    "type": "object",
    "properties": {
        "model_type": {
            "type": "string",
            "description": "with it, the keys are those of a config.json",
        },
        "config": {
            "type": "object",
            "description": "the content of a config.json, beside the options below",
        },
        "auto": {
            **_TEXT,
            "description": "an Auto class of transformers; null: the config's own",
        },
        "dtype": {**_TEXT, "description": "of the parameters; null: the config's own"},
        "assume": {
            **_TEXT,
            "description": '"zeros" for tensors that transformers leaves empty',
        },
        "keys": {
            "type": "string",
            "default": "name",
            "description": 'what keys derive from: "name" or "order"',
        },
    },
}
_OPTIONS = ("auto", "dtype", "assume", "keys")


@register("hf", schema=_SCHEMA)
def build(config: Mapping[str, Any]) -> InitFn:
    """The `InitFn` of a model of ``transformers``.

    Args:
      config: the content of a ``config.json``; or that under ``config``, with options
        of `shardinit.frontends.torch.from_config` beside it.

    Raises:
      SpecError: the config has faults, or torch or ``transformers`` is not installed.

    Example:
      >>> import shardinit
      >>> from shardinit.models import ModelSpec, build, example_config
      >>> plan = shardinit.plan(build(ModelSpec("hf", example_config("gpt2"))))
      >>> plan.parameter_count
      124439808
    """
    content, options = config, {}
    if "model_type" not in config:
        content = config.get("config")
        options = {k: v for k, v in config.items() if k != "config" and v is not None}
        faults = [(key, "unknown key") for key in options if key not in _OPTIONS]
        if not isinstance(content, Mapping):  # a path would be read
            faults.append(("config", "expected the content of a config.json"))
        if faults:
            raise SpecError("hf", faults)
    try:
        from shardinit.frontends import torch as frontend

        return frontend.from_config(content, **options)
    except MissingFrameworkError as error:  # nothing is wrong with the config
        text = f"where it is built, {error.where} is not installed: {error.remedy}"
        raise SpecError("hf", [("model", text)]) from error
    except ShardinitError as error:
        raise SpecError("hf", [("config", str(error))]) from error
