"""The values are Penzai's: against a file that Penzai wrote, and against Penzai."""

import json
import pathlib
import warnings

import jax
import pytest

import shardinit
from shardinit import deferred
from tests.core.bits import differing
from tests.golden import penzai_golden as golden

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # treescope looks at deprecated names of NumPy
    from penzai.deprecated.v1 import pz

FILE = json.loads(
    pathlib.Path(golden.__file__).with_name("penzai.json").read_text("utf-8")
)
FUNCTIONS = {
    "normal": lambda key: jax.random.normal(key, (8, 64)) * 0.02,
    "truncated": jax.nn.initializers.truncated_normal(0.5),
    "lecun": jax.nn.initializers.lecun_normal(),
    "xavier": jax.nn.initializers.xavier_uniform(),
    "laplace": lambda key: jax.random.laplace(key, (4, 96)),
}


def draw_of(kind):
    function = FUNCTIONS[kind]
    if kind in ("truncated", "lecun", "xavier"):
        return lambda key: function(key, (16, 64))
    return function


def model_of(make, draw):
    return [make(draw, name) for name in golden.NAMES]


def test_the_file_was_written_by_the_release_that_the_document_describes():
    assert FILE["penzai"] == "0.2.5"
    assert set(FILE["digests"]) == set(map(str, golden.SEEDS))


@pytest.mark.parametrize("kind", golden.DRAWS)
@pytest.mark.parametrize("seed", golden.SEEDS)
def test_values_are_those_that_penzai_wrote_down(kind, seed):
    model = model_of(deferred.UninitializedParameter, golden.DRAWS[kind])
    made = deferred.initialize_parameters(model, jax.random.key(seed))
    found = {parameter.name: golden.digest(parameter.value) for parameter in made}
    assert found == FILE["digests"][str(seed)][kind]


@pytest.mark.parametrize("shape", [(8, 1), (2, 4)])
@pytest.mark.few(1)
def test_sharded_values_are_those_that_penzai_wrote_down(shape):
    mesh = jax.make_mesh(shape, ("data", "model"))
    for kind, draw in golden.DRAWS.items():
        init = deferred.init_fn(model_of(deferred.UninitializedParameter, draw))
        made = shardinit.init(init, 1, mesh=mesh, rules=shardinit.fsdp(min_bytes=0))
        found = {parameter.name: golden.digest(parameter.value) for parameter in made}
        assert found == FILE["digests"]["1"][kind]


@pytest.mark.parametrize("kind", FUNCTIONS)
@pytest.mark.few(2)
def test_values_are_those_that_penzai_draws_here_and_now(kind, mesh):
    draw = draw_of(kind)
    theirs = model_of(pz.nn.UninitializedParameter, draw)
    ours = model_of(deferred.UninitializedParameter, draw)
    key = jax.random.key(17)

    def values(parameters):
        return [parameter.value for parameter in parameters]

    plain = pz.nn.initialize_parameters(theirs, key)
    made = deferred.initialize_parameters(ours, key)
    assert differing(values(made), values(plain)) == []
    compiled = jax.jit(lambda key: values(pz.nn.initialize_parameters(theirs, key)))
    sharded = shardinit.init(
        deferred.init_fn(ours), key, mesh=mesh, rules=shardinit.fsdp(min_bytes=0)
    )
    assert differing(values(sharded), compiled(key)) == []
