"""Writes what Treex itself makes of ``treex_models``: ``treex.json``.

Treex 0.6.9 is of 2022 and runs on a JAX of 2023, apart from this project:

    python3.9 -m venv treex && . treex/bin/activate
    pip install 'jax==0.4.13' 'jaxlib==0.4.13' 'numpy<1.25' 'scipy<1.12'
    pip install 'ml_dtypes<0.3' 'optax<0.1.8' 'chex==0.1.7' rich pyyaml msgpack
    pip install --no-deps 'flax==0.5.3' 'treex==0.6.9' 'treeo==0.0.11'
    python tests/golden/treex_golden.py

(treeo 0.2.2 lacks an argument that treex 0.6.9 passes; 0.0.11 is its contemporary.)
Two things are set up for it: one name that this JAX no longer has, used by Treex in an
annotation only, and the partitionable threefry that JAX has since made its default.
"""

import base64
import hashlib
import importlib
import json
import pathlib

import jax
import numpy as np
from treex_models import models

KEY = 42


def leaves(module):
    """Leaves in the order of the pytree, by the names of shardinit.module's fields."""
    import treex as tx

    def walk(value, path):
        if isinstance(value, tx.Module):
            for name in sorted(vars(value)):
                metadata = value.field_metadata.get(name)
                if metadata is not None and metadata.node:
                    yield from walk(getattr(value, name), f"{path}.{name}")
        elif isinstance(value, (list, tuple)):
            for number, item in enumerate(value):
                yield from walk(item, f"{path}[{number}]")
        elif hasattr(value, "dtype"):
            yield path.replace(".next_key.key", ".rng"), np.asarray(value)

    found = dict(walk(module, ""))
    # a setting here, an array there
    return {k: v for k, v in found.items() if not k.endswith(".momentum")}


def main():
    """Runs Treex and writes the file beside this one."""
    jax.config.update("jax_threefry_partitionable", True)
    numpy_api = importlib.import_module("jax._src.numpy.lax_numpy")
    numpy_api.ndarray = jax.numpy.ndarray
    tx = importlib.import_module("treex")
    golden = {"versions": {"jax": jax.__version__, "treex": tx.__version__}, "of": {}}
    for name, (module, inputs, _) in models(tx).items():
        module = module.init(KEY, inputs)
        golden["of"][name] = {
            path: {
                "shape": list(array.shape),
                "dtype": str(array.dtype),
                "sha256": hashlib.sha256(array.tobytes()).hexdigest(),
                "bytes": base64.b64encode(array.tobytes()).decode(),
            }
            for path, array in leaves(module).items()
        }
    path = pathlib.Path(__file__).with_name("treex.json")
    path.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
