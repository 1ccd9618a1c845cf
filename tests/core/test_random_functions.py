"""Random functions of any depth have the bits of plain jit.

This is the first part of the seeds; `python -m tests.core.random_functions 0 10000`
goes through as many as one has time for and counts what comes out.
"""

import jax
import pytest

from tests.core.random_functions import compare, function

PART = 10


@pytest.fixture(scope="module")
def four():
    """Four devices in two axes, as the seeds are run at length."""
    return jax.make_mesh((2, 2), ("a", "b"), devices=jax.devices()[:4])


@pytest.mark.parametrize("start", range(0, 40, PART))
@pytest.mark.few(1)
def test_random_functions_have_the_bits_of_jit(four, start):
    outcomes = [compare(seed, four) for seed in range(start, start + PART)]
    wrong = [o for o in outcomes if o.kind != "equal"]
    assert not wrong, "\n".join(f"{o.kind} {o.text}" for o in wrong)


def test_a_seed_is_one_function():
    assert [str(function(s)) for s in range(8)] == [str(function(s)) for s in range(8)]
    assert len({function(s).steps for s in range(40)}) == 40
