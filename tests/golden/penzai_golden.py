"""Golden values of Penzai 0.2.5: what its own ``initialize_parameters`` draws.

    python tests/golden/penzai_golden.py          # writes penzai.json beside this file

Every parameter is an `UninitializedParameter` of Penzai's V1 layers, drawn by Penzai;
nothing of shardinit runs here. The initializers are those of which the bits are the
same on every platform and JAX version (integers, bits, uniforms, comparisons), and one
that returns the key it was given. What has transcendental functions in it cannot be
kept in a file; the tests compare that with Penzai itself.
"""

import hashlib
import importlib.metadata
import json
import pathlib
import warnings

import jax
import jax.numpy as jnp
import numpy as np

NAMES = (
    "w",
    "embedder.embeddings",
    "decoder.layer_0.attn.query.weights",
    "decoder.layer_11.mlp.out_linear.weights",
    "größe/λ",
    "",
)
SEEDS = (0, 1, 2**31 - 1)
DRAWS = {
    "key": jax.random.key_data,
    "bits": lambda key: jax.random.bits(key, (8, 64)),
    "uniform": lambda key: jax.random.uniform(key, (8, 64)),
    "uniform bfloat16": lambda key: jax.random.uniform(key, (64, 8), jnp.bfloat16),
    "randint": lambda key: jax.random.randint(key, (5, 7), -100, 1000),
    "bernoulli": lambda key: jax.random.bernoulli(key, 0.3, (8, 33)),
    "two": lambda key: [jax.random.bits(k, (3, 40)) for k in jax.random.split(key)],
    "zeros": lambda key: jnp.zeros((4, 4)),
}


def digest(value):
    """SHA-256 over dtype, shape and bytes of each leaf, in hex."""
    sha = hashlib.sha256()
    for leaf in map(np.asarray, jax.tree.leaves(value)):
        sha.update(f"{leaf.dtype}{leaf.shape}".encode())
        sha.update(np.ascontiguousarray(leaf).tobytes())
    return sha.hexdigest()


def by_penzai():
    """For each seed and initializer the digests of all names, drawn by Penzai."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from penzai.deprecated.v1 import pz
    table = {}
    for seed in SEEDS:
        for kind, draw in DRAWS.items():
            model = [pz.nn.UninitializedParameter(draw, name) for name in NAMES]
            made = pz.nn.initialize_parameters(model, jax.random.key(seed))
            digests = {p.name: digest(p.value) for p in made}
            table.setdefault(str(seed), {})[kind] = digests
    return table


if __name__ == "__main__":
    found = {
        "penzai": importlib.metadata.version("penzai"),
        "jax": importlib.metadata.version("jax"),
        "digests": by_penzai(),
    }
    path = pathlib.Path(__file__).with_name("penzai.json")
    path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
