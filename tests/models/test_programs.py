"""The init program of a large model is a small file."""

import pytest

import shardinit
from shardinit.models import ModelSpec, build, example_config

pytestmark = pytest.mark.once


@pytest.mark.slow
def test_405b_parameters_in_under_100_kilobytes():
    spec = ModelSpec("decoder", example_config("llama-3.1-405b"))
    plan = shardinit.plan(build(spec))
    assert plan.parameter_count == 405_853_388_800
    data = shardinit.export_plan(plan).to_bytes()
    assert len(data) <= 100_000
    assert shardinit.InitProgram.from_bytes(data).fingerprint == plan.fingerprint
