"""Models by name: from a spec, which is data, to an `InitFn`, which is a function.

A spec says which registered builder to run and with what configuration. It may come
from a file or over a network, so it holds nothing but plain data, and it can only
choose among the builders that the operator has installed.

Importing this package imports neither JAX nor Flax; building a model does.
"""

from shardinit.models.registry import (
    Builder,
    build,
    builder,
    load_package,
    model_names,
    register,
)
from shardinit.models.spec import ModelSpec, example_config, example_names

__all__ = [
    "Builder",
    "ModelSpec",
    "build",
    "builder",
    "example_config",
    "example_names",
    "load_package",
    "model_names",
    "register",
]
