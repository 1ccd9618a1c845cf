"""A model of transformers, asked of a service as data."""

import numpy as np
import pytest

import shardinit
from shardinit.errors import SpecError
from shardinit.models import ModelSpec, build
from shardinit.service.server.server import Server

CONFIG = {
    "model_type": "gpt2",
    "n_layer": 1,
    "n_embd": 32,
    "n_head": 2,
    "vocab_size": 99,
}
pytestmark = pytest.mark.once


@pytest.mark.slow  # imports torch and transformers, here and in a worker
@pytest.mark.filterwarnings("ignore")
def test_it_is_described_and_streamed_with_the_digest_of_one_built_here(client):
    pytest.importorskip("torch", reason="torch is not installed")
    pytest.importorskip("transformers", reason="transformers is not installed")
    spec = ModelSpec("hf", CONFIG)
    plan = shardinit.plan(build(spec))
    described = client.describe(spec)
    assert described.fingerprint == plan.fingerprint
    assert [leaf.path for leaf in described.leaves] == [x.path for x in plan.leaves]
    wanted = shardinit.digest(shardinit.compile_plan(plan)(7))
    assert shardinit.digest(client.init(spec, 7, via="stream")).root == wanted.root
    numpy = client.numpy(spec, 7)
    assert all(isinstance(array, np.ndarray) for array in numpy.values())
    assert shardinit.digest(numpy).root == wanted.root


def test_a_service_without_pytorch_says_what_to_install_and_where(
    tmp_path, monkeypatch
):
    (tmp_path / "torch.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with (
        Server() as server,
        shardinit.connect(server.address, cache_dir=tmp_path / "cache") as client,
    ):
        for call in (client.describe, client.program):
            with pytest.raises(SpecError) as caught:
                call(ModelSpec("hf", CONFIG))
            ((field, text),) = caught.value.faults
            assert field == "model"
            assert "torch is not installed: pip install 'shardinit[torch]'" in text
        assert client.models()
