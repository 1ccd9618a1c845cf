"""Models in the words that Treex and shardinit.module have in common.

``models(tx)`` builds them with either package, ``treex_golden.py`` writes down what
Treex makes of them, ``test_golden.py`` compares.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def models(tx):
    """Name to (module, inputs or None, whether its values are free of rounding)."""

    class Mechanisms(tx.Module):
        """All three, with fields that are not in alphabetical order."""

        w: Any = tx.Parameter.node()
        a: Any = tx.Parameter.node()
        m: Any = tx.Parameter.node()

        def __init__(self):
            self.w = None
            self.m = None
            self.a = tx.Initializer(lambda key: jax.random.uniform(key, shape=(3,)))

        def rng_init(self):
            self.m = self.a + jax.random.uniform(tx.next_key(), shape=(3,))

        def __call__(self, x):
            if self.initializing():
                self.w = jax.random.uniform(tx.next_key(), shape=(x.shape[-1], 3))
            return x @ self.w + self.a + self.m

    class Tree(tx.Module):
        """Children before parents; lists and dicts; a leaf between modules."""

        z: Mechanisms
        b: Mechanisms
        k: Any = tx.Parameter.node()

        def __init__(self):
            self.z = Mechanisms()
            self.k = tx.Initializer(lambda key: jax.random.uniform(key, shape=(2,)))
            self.b = Mechanisms()

        def rng_init(self):
            self.k = self.k - jax.random.uniform(tx.next_key(), shape=(2,))

        def __call__(self, x):
            return self.b(self.z(x))

    class Draws(tx.Module):
        """Constructed in a compact method, it draws at once."""

        u: Any = tx.Parameter.node()
        v: Any = tx.Parameter.node()

        def __init__(self):
            self.u = tx.Initializer(lambda key: jax.random.uniform(key, shape=(2,)))
            self.v = None

        def rng_init(self):
            self.v = jax.random.uniform(tx.next_key(), shape=(2,))

        def __call__(self, x):
            return x + self.u.sum() + self.v.sum()

    class Compact(tx.Module):
        w: Any = tx.Parameter.node()

        def __init__(self):
            self.w = None

        @tx.compact
        def __call__(self, x):
            if self.initializing():
                self.w = jax.random.uniform(tx.next_key(), shape=(2,))
            x = Draws()(x)
            x = tx.Linear(4, kernel_init=uniform, bias_init=uniform)(x)
            x = Draws()(x)
            return tx.Linear(5, kernel_init=uniform)(x) * self.w.sum()

    class Twice(tx.Module):
        """Called twice in the one forward pass, the second draw counts."""

        m: Mechanisms

        def __init__(self):
            self.m = Mechanisms()

        def __call__(self, x):
            return self.m(self.m(x))

    class DropoutNet(tx.Module):
        dropout: tx.Dropout

        def __init__(self):
            self.dropout = tx.Dropout(0.5)

        def __call__(self, x):
            return self.dropout(x)

    uniform = jax.random.uniform
    x = np.ones((2, 4), np.float32)
    image = np.ones((2, 8, 8, 3), np.float32)
    ids = np.zeros((2, 3), np.int32)
    return {
        "mechanisms": (Mechanisms(), x, True),
        "tree": (Tree(), np.ones((2, 3), np.float32), True),
        "twice": (Twice(), np.ones((2, 3), np.float32), True),
        "compact": (Compact(), x, True),
        "linear": (tx.Linear(8, kernel_init=uniform, bias_init=uniform), x, True),
        "conv": (tx.Conv(4, [3, 3], kernel_init=uniform), image, True),
        "embed": (tx.Embed(16, 8, embedding_init=uniform), ids, True),
        "batch_norm": (tx.BatchNorm(scale_init=uniform, bias_init=uniform), x, True),
        "layer_norm": (tx.LayerNorm(scale_init=uniform, bias_init=uniform), x, True),
        "dropout": (DropoutNet(), x, True),
        "mlp": (tx.MLP([8, 16, 3]), x, False),
        "sequential": (
            tx.Sequential(
                tx.Linear(32), jnp.tanh, tx.BatchNorm(), tx.Linear(40), tx.LayerNorm()
            ),
            x,
            False,
        ),
        "conv_default": (tx.Conv(32, [3, 3]), image, False),
        "embed_default": (tx.Embed(16, 32), ids, False),
    }


def leaves(module):
    """Path to numpy array of every leaf, keys as their words."""
    found = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(module)[0]:
        if jnp.issubdtype(leaf.dtype, getattr(jax.dtypes, "prng_key", np.void)):
            leaf = jax.random.key_data(leaf)
        found[jax.tree_util.keystr(path)] = np.asarray(leaf)
    return found
