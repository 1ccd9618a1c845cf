"""Hugging Face: a model of ``transformers`` from its configuration alone.

Whatever class of ``transformers`` a ``config.json`` names, none special-cased. Nothing
is fetched: no weights, no code of a hub, no kernels.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch

from shardinit.errors import InitFnError, ShardinitError
from shardinit.extras import needs
from shardinit.frontends.torch.state import Keys, TorchInit, dtype_named, init_fn

_WHERE = "torch.from_config"
# Where a configuration names no architecture: the first of these that knows it.
_AUTO = (
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForImageTextToText",
    "AutoModel",
)


def from_config(
    config: str | os.PathLike[str] | Mapping[str, Any] | Any,
    *,
    auto: str | None = None,
    dtype: str | torch.dtype | None = None,
    assume: Literal["zeros"] | None = None,
    keys: Keys = "name",
    trust_remote_code: bool = False,
) -> TorchInit:
    """Makes an `InitFn` of a Hugging Face model, by its configuration.

    Args:
      config: a ``config.json`` or the folder that holds one, its content, or a
        configuration of ``transformers``.
      auto: an Auto class of ``transformers``, such as ``"AutoModelForCausalLM"``; None
        for the configuration's own ``architectures``, or the first that knows it.
      dtype: of the parameters; None for the configuration's own.
      assume: see `init_fn`.
      keys: see `init_fn`.
      trust_remote_code: refused; it is here to say so.

    Raises:
      InitFnError: ``transformers`` has no such model, or refuses the configuration.
      MissingFrameworkError: (an ``ImportError``) ``transformers`` is not installed.
      UninitializedParameterError: see `init_fn`.
      UnsupportedConfigError: see `init_fn`.
      OSError: the file cannot be read.

    Example:
      >>> import shardinit
      >>> from shardinit.frontends import torch as from_torch
      >>> config = {"model_type": "gpt2", "n_layer": 2, "n_embd": 64, "n_head": 2}
      >>> fn = from_torch.from_config(config | {"vocab_size": 100})
      >>> fn.ties
      mappingproxy({'lm_head.weight': 'transformer.wte.weight'})
    """
    if trust_remote_code:
        raise InitFnError(
            _WHERE, "trust_remote_code was asked for", "a model of transformers itself"
        )
    with needs("transformers", "transformers"):
        import transformers
    made = _configuration(config, transformers)
    cls = _class_of(made, auto, transformers)
    chosen = {} if dtype is None else {"dtype": dtype_named(dtype)}

    make = getattr(cls, "from_config", None) or cls._from_config

    def build() -> torch.nn.Module:
        # eager: other attentions may be kernels, which a hub would be asked for
        return make(made, attn_implementation="eager", **chosen)

    build.__name__ = cls.__name__
    with _offline(), _refused(made.model_type):
        return init_fn(build, assume=assume, keys=keys)


def _configuration(config: Any, transformers: Any) -> Any:
    """A configuration of ``transformers``, the caller's own left as it is."""
    if isinstance(config, transformers.PretrainedConfig):
        config = config.to_dict()
    if isinstance(config, str | os.PathLike):
        path = os.fspath(config)
        if os.path.isdir(path):
            path = os.path.join(path, "config.json")
        with open(path, "rb") as file:
            try:
                config = json.load(file)
            except ValueError as error:
                raise InitFnError(_WHERE, f"{path} is not JSON: {error}") from error
    if not isinstance(config, Mapping):
        raise InitFnError(
            _WHERE, f"got {type(config).__name__}", "a config.json, or its content"
        )
    kind = config.get("model_type")
    known = transformers.models.auto.configuration_auto.CONFIG_MAPPING
    if not isinstance(kind, str) or kind not in known:
        raise InitFnError(
            _WHERE,
            f"model_type is {kind!r}",
            f"one that transformers {transformers.__version__} has, such as 'llama'",
            "Code of a hub is not run: pass what builds the model to torch.init_fn"
            if "auto_map" in config
            else "",
        )
    with _offline(), _refused(kind):
        content = json.loads(json.dumps(_finite(config)))
        return known[kind].from_dict(content)


def _finite(tree: Any) -> Any:
    """The content of a ``config.json``: an infinity is an object with one key there."""
    if isinstance(tree, Mapping):
        if set(tree) == {"__float__"}:
            return float(tree["__float__"])
        return {
            name: _finite(item) for name, item in tree.items() if name != "auto_map"
        }
    return [_finite(item) for item in tree] if isinstance(tree, list | tuple) else tree


def _class_of(config: Any, auto: str | None, transformers: Any) -> Any:
    """The class of ``transformers`` that a configuration is for, or an Auto class."""
    if auto is None:
        for name in config.architectures or ():
            cls = getattr(transformers, name, None)
            if _is_model_for(config, cls, transformers):
                return cls
    elif auto not in transformers.models.auto.modeling_auto.__all__:
        raise InitFnError(_WHERE, f"auto is {auto!r}", "an Auto class of transformers")
    for name in (auto,) if auto else _AUTO:
        if type(config) in getattr(transformers, name)._model_mapping:
            return getattr(transformers, name)
    raise InitFnError(
        _WHERE,
        f"{auto or 'no Auto class'} knows no model of a {type(config).__name__}",
        "a configuration that an Auto class builds",
    )


def _is_model_for(config: Any, cls: Any, transformers: Any) -> bool:
    """Whether a class of ``transformers`` is a model with such a configuration."""
    model = isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)
    return model and isinstance(config, getattr(cls, "config_class", None) or ())


@contextmanager
def _refused(kind: str) -> Iterator[None]:
    """What transformers does not take, as an error that names the model."""
    try:
        yield
    except (ShardinitError, MemoryError):
        raise
    except Exception as error:  # whatever a constructor makes of its settings
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise InitFnError(
            kind, f"transformers refuses the configuration: {text}"
        ) from error


@contextmanager
def _offline() -> Iterator[None]:
    """No hub is asked, whatever a configuration names."""
    constants: Any = importlib.import_module("huggingface_hub.constants")
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
