"""The room of runs: words of operands, and what processes tell each other."""

import jax
import numpy as np
import pytest

from shardinit.core.cut.cutter import cut
from shardinit.core.run import arguments, processes
from shardinit.errors import UnsupportedConfigError

KEY = jax.eval_shape(jax.random.key, 0)


def test_the_words_of_a_leaf_are_those_of_its_keys_one_after_the_other():
    def fn(key):
        a, b = jax.random.split(key)
        return jax.random.normal(b, (8, 32)) + jax.random.normal(a, (8, 32))

    made = cut(fn, KEY)
    words = arguments.key_words(jax.random.key(7), made)
    (vector,) = arguments.operand_words([made.leaves[0].operands], words)
    expected = jax.random.key_data(jax.random.split(jax.random.key(7)))
    assert sorted(vector.tolist()) == sorted(np.ravel(expected).tolist())


def test_a_key_of_another_implementation_is_refused():
    made = cut(lambda key: jax.random.normal(key, (8, 32)), KEY)
    with pytest.raises(TypeError, match="rbg key with 4 words"):
        arguments.key_words(jax.random.key(0, impl="rbg"), made)


def test_meshes_of_one_process_wait_for_nobody(mesh):
    place = jax.sharding.NamedSharding(mesh, jax.P())
    processes.assert_same({"key": "1"}, [place])


@pytest.mark.parametrize("text", ["", "x", "0", "-1", "nan"])
def test_a_wait_that_is_none_is_refused(monkeypatch, text):
    monkeypatch.setenv(processes.WAIT_VARIABLE, text)
    with pytest.raises(UnsupportedConfigError, match=processes.WAIT_VARIABLE):
        processes._wait_seconds()
