"""``shardinit client`` against a service that runs here."""

import contextlib
import json
import sys
from concurrent.futures import ThreadPoolExecutor

import grpc
import jax
import numpy as np
import pytest

import shardinit
from shardinit import cli
from shardinit.core.plan import tables
from shardinit.models import ModelSpec, build
from shardinit.service.server.config import Config
from shardinit.service.server.server import Server
from tests.test_cli import TINY

pytestmark = pytest.mark.once


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("root")


@pytest.fixture(scope="module")
def server(root):
    with Server(Config(checkpoint_roots=(root,))) as running:
        yield running


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(TINY))
    return str(path)


@pytest.fixture
def ask(server, monkeypatch, capsys, tmp_path):
    """Runs a command; what it printed, or said on its way out."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def words(*words, code=0):
        monkeypatch.setattr(sys, "argv", ["shardinit", *words])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        said = capsys.readouterr()
        assert (caught.value.code or 0) == code, said.err
        return said.err if code else said.out

    def run(*args, code=0, target=server.address):
        return words("client", "--target", target, *args, code=code)

    run.words = words
    return run


def test_options_of_the_connection_stand_behind_the_command_too(ask, server):
    for words in (["--target", server.address], [f"--target={server.address}"]):
        assert ask("health", *words, target="localhost:1") == "SERVING\n"
    assert ask("health", "-t", server.address, "--timeout", "60") == "SERVING\n"
    said = ask("version", "--target", "localhost:1", "--timeout", "5", code=1)
    assert "shardinit serve starts one" in said


def test_health_is_asked_for_in_one_way_with_client_and_without(ask, server):
    """Of a target behind the command, or of one that is an option."""
    for words in (["client", "health"], ["health"]):
        for target in ([server.address], ["--target", server.address]):
            assert ask.words(*words, *target) == "SERVING\n"
    assert ask("health", server.address, target="localhost:1") == "SERVING\n"


@pytest.mark.parametrize(
    "words", [("health",), ("client", "health"), ("client", "version")]
)
def test_a_target_without_a_port_is_wrong_usage_that_names_the_usual_one(ask, words):
    said = ask.words(*words, "--target", "localhost", code=2)
    assert said.startswith("error: --target: got 'localhost', which has no port")
    assert "Write 'localhost:50051'" in said


@pytest.mark.parametrize(
    "target",
    ["[::1]:1", "unix:/run/x", "dns:///a:1", "ipv4:10.0.0.1:1,10.0.0.2:1", "xds:///a"],
)
def test_a_target_that_says_where_to_go_is_taken(target):
    shardinit.connect(target).close()


def test_health_that_is_not_said_is_told_with_its_code(ask, server):
    """Of a service that is not there, of none that has health, of no server."""
    said = ask("health", "--service", "no.such.Service", code=1)
    assert "health of" in said
    assert "'no.such.Service'" in said
    with _without_health() as address:
        said = ask.words("health", address, code=1)
        assert "does not have this call" in said
    said = ask.words("health", "127.0.0.1:1", code=1)
    assert "cannot be reached" in said
    assert "shardinit serve starts one" in said


@contextlib.contextmanager
def _without_health():
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(0)


def test_health_and_version_are_told(ask):
    assert ask("health") == "SERVING\n"
    assert json.loads(ask("health", "--json")) == {"status": "SERVING"}
    found = json.loads(ask("version", "--json"))
    assert found["protocol"] == 1
    assert found["jax"] == jax.__version__
    assert f"jax {jax.__version__}" in ask("version")


def test_models_are_listed_with_their_keys(ask):
    assert "num_hidden_layers" in ask("models")
    assert "decoder" in json.loads(ask("models", "--json"))


def test_a_model_is_described_as_a_plan_would(ask, config):
    plan = shardinit.plan(build(ModelSpec("decoder", TINY)))
    found = json.loads(ask("describe", config, "--mesh", "data=2", "--json"))
    assert found["fingerprint"] == plan.fingerprint
    assert [leaf["path"] for leaf in found["leaves"]] == [x.path for x in plan.leaves]
    said = ask("describe", config, "--mesh", "data=2")
    assert f"{plan.total_bytes:,} bytes" in said
    assert [line.split()[2] for line in said.splitlines()[1:-1]] == [
        row[2].split()[0] for row in tables.rows(plan.leaves)
    ]


def test_a_program_is_kept_in_a_file(ask, config, tmp_path):
    out = str(tmp_path / "program")
    found = json.loads(ask("program", config, "--out", out, "--json"))
    assert shardinit.load_program(out).sha256 == found["sha256"]


def test_a_window_is_printed_or_kept(ask, config, tmp_path):
    fn = build(ModelSpec("decoder", TINY))
    path = next(iter(shardinit.open(fn, 3)))
    right = shardinit.read(fn, 3, path, np.s_[:2])
    out = str(tmp_path / "w.npy")
    assert path in ask("stream", config, path, ":2", "--seed", "3", "--out", out)
    assert np.load(out).tobytes() == right.tobytes()
    assert path in ask("stream", config, path, ":2", "--seed", "3", "--out", out)
    said = ask("stream", config, path, ":2", "--seed", "4", "--out", out, code=1)
    assert "it exists, and is not this window" in said
    assert np.load(out).tobytes() == right.tobytes()
    found = json.loads(ask("stream", config, path, ":2", "--seed", "3", "--json"))
    assert found["shape"] == list(right.shape)
    assert np.array_equal(np.array(found["values"], right.dtype), right)
    assert "no such leaf" in ask("stream", config, "nowhere", code=1)


def test_a_checkpoint_is_written_there(ask, config, root):
    found = json.loads(ask("checkpoint", config, str(root / "one"), "--json"))
    assert (root / "one").exists()
    assert found["receipt"]["root"] in ask("checkpoint", config, str(root / "one"))
    assert "error:" in ask("checkpoint", config, "/elsewhere", code=1)


def test_what_goes_wrong_is_one_line_and_a_code(ask, config):
    assert "error:" in ask("models", code=1, target="127.0.0.1:1")
    assert "error:" in ask("health", code=1, target="127.0.0.1:1")
    ask("describe", code=2)
    assert "'x'" in ask("describe", config, "--mesh", "x", code=2)


@pytest.mark.slow
def test_a_model_is_asked_for_as_it_is_planned(ask, config, tmp_path):
    """What `plan` may be told at the shell, its client may be too."""
    narrow = tmp_path / "narrow.json"
    narrow.write_text(json.dumps({**TINY, "torch_dtype": "bfloat16"}))
    placed = ("--mesh", "data=2", "--rules", "embed=", "--opt-memory", "pinned_host")
    state = ("--opt-state", "layers/**", "--opt-rules", "mlp=data")
    said = json.loads(ask("describe", config, *placed, *state, "--json"))
    cut = {leaf["path"] for leaf in said["leaves"] if any(leaf["spec"])}
    assert cut
    assert all(path.startswith("layers/") for path in cut)
    drawn = ("--draw-dtype", "float32")
    fn = build(ModelSpec("decoder", json.loads(narrow.read_text())))
    plan = shardinit.plan(fn, draw_dtype="float32")
    said = json.loads(ask("describe", str(narrow), *drawn, "--json"))
    assert said["fingerprint"] == plan.fingerprint
    path = plan.leaves[0].path
    found = json.loads(ask("stream", str(narrow), path, ":2", *drawn, "--json"))
    right = np.asarray(shardinit.open(plan, 0)[path][:2])
    assert np.array_equal(np.array(found["values"]), right.astype(np.float64))
    program = "0" * 64
    assert "--draw-dtype: the draws" in ask("describe", program, *drawn, code=1)


@pytest.mark.slow
def test_a_key_for_each_stream_is_sent(ask, config):
    fn = build(ModelSpec("decoder", TINY))
    key = {"params": 3, "dropout": 1}
    path = shardinit.plan(fn).leaves[0].path
    right = shardinit.read(fn, key, path, np.s_[:2])
    seed = ("--seed", "params=3,dropout=1")
    found = json.loads(ask("stream", config, path, ":2", *seed, "--json"))
    assert np.array_equal(np.array(found["values"], right.dtype), right)
    found = json.loads(ask("describe", config, *seed, "--json"))
    assert found["fingerprint"] == shardinit.plan(fn, key=key).fingerprint
