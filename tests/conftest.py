"""Eight simulated CPU devices for every test, set before JAX is imported.

``SHARDINIT_TEST_PLATFORM=cuda`` takes the devices of that platform instead, for the
tests marked ``devices``; the others count on eight.
"""

import collections
import os
import signal

os.environ["JAX_PLATFORMS"] = os.environ.get("SHARDINIT_TEST_PLATFORM", "cpu")
os.environ["KERAS_BACKEND"] = "jax"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import hypothesis
import jax
import jaxtyping
import pytest

from tests import typechecker

# A shell has what it runs in the background ignore Ctrl-C, and so would all that the
# tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Calls in the rooms of core that carry arrays are held against their annotations:
# arrays by jaxtyping, all else by beartype. Doors that users call check for themselves.
# SHARDINIT_UNCHECKED=1 leaves that out, a third of these rooms' time: CI checks once.
RUN = "arguments growing lower mapped noise parts shards tensors"
CHECKED = (
    *("prng", "ir", "window", "cut", "program"),
    *(f"run.{name}" for name in RUN.split()),
)
if not os.environ.get("SHARDINIT_UNCHECKED"):
    jaxtyping.install_import_hook(
        [f"shardinit.core.{room}" for room in CHECKED], f"{typechecker.__name__}.check"
    ).__enter__()

hypothesis.settings.register_profile(
    "shardinit",
    deadline=None,  # an example compiles programs; timings decide nothing here
    derandomize=True,
    print_blob=True,
    suppress_health_check=list(hypothesis.HealthCheck),
)
hypothesis.settings.load_profile("shardinit")


@pytest.hookimpl(tryfirst=True)  # before pytest leaves out what is slow
def pytest_collection_modifyitems(items):
    """Of a test marked ``few(n)`` all but n sets of parameters are slow.

    Those that stay are spread over the list, whose neighbours are alike.
    """
    families = collections.defaultdict(list)
    for item in items:
        if item.get_closest_marker("few"):
            families[item.nodeid.partition("[")[0]].append(item)
    for family in families.values():
        (count,) = family[0].get_closest_marker("few").args
        kept = {number * len(family) // count for number in range(count)}
        for number, item in enumerate(family):
            if number not in kept:
                item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def mesh():
    """Two data by four model devices."""
    return jax.make_mesh((2, 4), ("data", "model"))
