"""Models by name: from a spec, which is data, to an `InitFn`, which is a function.

A spec says which registered builder to run and with what configuration. It may come
from a file or over a network, so it holds nothing but plain data, and it can only
choose among the builders that the operator has installed.

Importing this package imports neither JAX nor Flax; building a model does.

>>> import shardinit
>>> spec = shardinit.ModelSpec("decoder", shardinit.models.example_config("gpt2"))
>>> shardinit.plan(shardinit.models.build(spec)).parameter_count
124439808
"""

from shardinit.models.registry import Builder as Builder
from shardinit.models.registry import build as build
from shardinit.models.registry import builder as builder
from shardinit.models.registry import load_package as load_package
from shardinit.models.registry import model_names as model_names
from shardinit.models.registry import register as register
from shardinit.models.spec import ModelSpec as ModelSpec
from shardinit.models.spec import example_config as example_config
from shardinit.models.spec import example_names as example_names
