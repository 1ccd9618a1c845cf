"""`shardinit init`, `digest` and `verify`."""

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

import shardinit as lib
from shardinit import cli
from shardinit.models import ModelSpec, build
from shardinit.storage import orbax

pytestmark = pytest.mark.once

TINY = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}


def shardinit(*args, code=0):
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-m", "shardinit", *args],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    assert "Traceback" not in done.stdout + done.stderr
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


@pytest.fixture
def says(monkeypatch, capsys):
    """Runs the command line in this process; what it says, by its exit code."""

    def run(*args, code=0):
        monkeypatch.setattr(sys, "argv", ["shardinit", *args])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert (caught.value.code or 0) == code
        captured = capsys.readouterr()
        if code in (1, 3, 4):
            assert captured.err.startswith("error: ")
        return captured.out if code == 0 else captured.err

    return run


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "config.json"
    path.write_text(json.dumps(TINY))
    return str(path)


@pytest.fixture(scope="module")
def expected():
    return lib.init(build(ModelSpec("decoder", TINY)).fn, 5)


@pytest.mark.slow
def test_both_formats_hold_the_weights_of_one_receipt(tmp_path, config, expected, says):
    st, oc = str(tmp_path / "st"), str(tmp_path / "oc")
    said = says("init", config, "--out", st, "--seed", "5", "--max-shard-size", "100kB")
    root = lib.digest(expected).root
    assert root in said
    said = shardinit(
        "init", config, "--out", oc, "--seed", "5", "--format", "orbax",
        "--mesh", "data=2,model=4", "--rules", "embed=data,mlp=model",
    )  # fmt: skip
    assert root in said
    receipts = [json.loads(Path(f"{x}.receipt.json").read_text()) for x in (st, oc)]
    assert receipts[0]["leaves"] == receipts[1]["leaves"]
    assert receipts[0]["seed"] == 5
    for receipt in (st, oc):
        for folder in (st, oc):
            assert root in says("verify", f"{receipt}.receipt.json", folder)
    tensors = {}
    for name in os.listdir(st):
        if name.endswith(".safetensors"):
            tensors |= safetensors.numpy.load_file(os.path.join(st, name))
    kernel = expected["embed"]["embedding"]
    assert np.array_equal(tensors["embed.embedding"], np.asarray(kernel))
    assert lib.digest(orbax.restore(oc)).root == root


def test_digest_lists_every_leaf_and_the_root(tmp_path, config, expected, says):
    out = str(tmp_path / "out")
    says("init", config, "--out", out, "--seed", "5")
    want = lib.digest(expected)
    lines = [line.split("  ") for line in says("digest", out).splitlines()]
    assert {path: value for value, path in lines} == {**want.leaves, "root": want.root}
    data = json.loads(says("digest", out, "--json"))
    assert data == {"root": want.root, "leaves": data["leaves"]}
    assert data["leaves"] == want.leaves


def test_a_program_is_initialised_as_its_model(tmp_path, config, expected, says):
    program = lib.export_plan(build(ModelSpec("decoder", TINY)))
    program.save(tmp_path / "model.init")
    out = str(tmp_path / "out")
    said = says("init", str(tmp_path / "model.init"), "--out", out, "--seed", "5")
    assert lib.digest(expected).root in said


def test_verify_names_the_leaves_that_differ(tmp_path, config, says, capsys):
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    says("init", config, "--out", a, "--seed", "5")
    says("init", config, "--out", b, "--seed", "6")
    said = says("verify", f"{a}.receipt.json", b, code=3)
    assert "'embed/embedding' has other values" in said
    assert "norm" not in said.split("and")[0]  # ones under every seed
    same = json.loads(says("verify", f"{a}.receipt.json", a, "--json"))
    root = json.loads(Path(f"{a}.receipt.json").read_text())["root"]
    assert same == {"ok": True, "differences": [], "root": root}


def test_a_folder_is_no_receipt(tmp_path, says):
    said = says("verify", str(tmp_path), str(tmp_path), code=4)
    assert "it is a folder; expected the file of a receipt" in said


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (("--distributed", "auto"), "--format orbax"),
        (("--format", "orbax", "--distributed", "host0"), "HOST:PORT,PROCESSES,THIS"),
        (("--format", "orbax", "--distributed", "host0:1,2,2"), "host0:8476,4,0"),
    ],
)
def test_a_job_that_is_none_is_refused(tmp_path, config, says, given, expected):
    out = str(tmp_path / "made")
    assert expected in says("init", config, "--out", out, *given, code=2)


@pytest.mark.skipif(sys.platform != "linux", reason="as the jobs of test_processes.py")
def test_processes_of_a_job_write_one_checkpoint(tmp_path, config, expected):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment["JAX_PLATFORMS"] = "cpu"
    out = tmp_path / "made"
    given = ("--format", "orbax", "--mesh", "data=4", "--seed", "5", "--out", str(out))
    jobs = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "shardinit", "init", config, *given),
                *("--distributed", f"{address},2,{number}"),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for number in range(2)
    ]
    said = [job.communicate(timeout=200) for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], said
    root = lib.digest(expected).root
    assert f"root {root}" in said[0][0]
    assert "root" not in said[1][0]
    assert json.loads((tmp_path / "made.receipt.json").read_text())["root"] == root
    lib.verify_receipt(tmp_path / "made.receipt.json", orbax.restore(out))


@pytest.mark.slow
def test_what_goes_wrong_is_one_line(tmp_path, config, says):
    out = str(tmp_path / "out")
    (tmp_path / "other").write_text("no program")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "nothing" / "file").write_text("no checkpoint")
    says("init", config, "--out", out)
    before = jax.tree.map(str, sorted(os.walk(tmp_path)))
    for args, message in [
        (["init", config, "--out", out, "--seed", "1"], "it is of another seed"),
        (["init", config, "--out", out, "--format", "orbax"], "it is not orbax"),
        (["init", config, "--out", out + "2", "--mesh", "a=2"], "--mesh"),
        (["init", config, "--out", out + "2", "--max-memory", "9XB"], "--max-memory"),
        (["init", "nope", "--out", out + "2"], "no example config"),
        (
            ["init", config, "--out", out, "--format", "orbax", "--max-memory", "1GB"],
            "--max-memory",
        ),
        (
            ["init", config, "--out", "/dev/null/a/b", "--format", "orbax"],
            "there is no folder /dev/null/a",
        ),
        (["init", config, "--out", "/dev/null/a"], "(Not a directory)"),
    ]:
        said = says(*args, code=1)
        assert message in said
        assert said.count("\n") == 1 + ("fault" in said)  # a line for each fault
    for args, message in [
        (["init", str(tmp_path / "other"), "--out", out + "2"], "init program"),
        (["init", "missing.json", "--out", out + "2"], "cannot read 'missing.json'"),
        (["digest", out + "2"], "there is no such folder"),
        (["digest", config], "it is a file; expected a checkpoint's folder"),
        (["digest", str(tmp_path / "nothing")], "it cannot be read"),
        (["verify", out + "2.json", out], "No such file"),
        (["verify", str(tmp_path / "other"), out], "receipt"),
        (["verify", config, out], f"receipt {config!r}: it cannot be read"),
    ]:
        said = says(*args, code=4)
        assert message in said
        assert said.count("\n") == 1 + ("fault" in said)
    assert jax.tree.map(str, sorted(os.walk(tmp_path))) == before


@pytest.mark.parametrize("layout", ["safetensors", "orbax"])
@pytest.mark.slow
def test_the_same_command_again_verifies_and_ends_well(tmp_path, config, says, layout):
    out = str(tmp_path / "out")
    command = ("init", config, "--out", out, "--format", layout)

    def state():
        files = [path for path in Path(tmp_path).rglob("*") if path.is_file()]
        return {
            str(path): (path.stat().st_mtime_ns, path.stat().st_ino) for path in files
        }

    first, before = says(*command), state()
    again = says(*command)
    assert "is there already, and verified" in again
    assert again.split()[-1] == first.split()[-1]
    facts = json.loads(says(*command, "--json"))
    assert (facts["root"], facts["written"]) == (first.split()[-1], False)
    assert state() == before
    os.unlink(out + ".receipt.json")  # as if it had ended before the receipt
    assert "is there already, and verified" in says(*command)
    assert Path(out + ".receipt.json").exists()
    damaged = max((p for p in Path(out).rglob("*") if p.is_file()), key=os.path.getsize)
    if layout == "safetensors":
        with damaged.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\x7f")
        assert "its leaves are not those of its receipt" in says(*command, code=1)
        os.unlink(out + ".receipt.json")
        assert "has other values" in says(*command, code=1)


@pytest.mark.slow
def test_init_starts_from_executables_that_compile_wrote(tmp_path, config, says):
    code, plain, loaded = (str(tmp_path / name) for name in ("code", "plain", "loaded"))
    placed = ("--mesh", "data=2,model=4", "--rules", "embed=data,mlp=model")
    said = says("compile", config, "--out", code, *placed)
    digest = said.split()[-1]
    assert digest == hashlib.sha256(Path(code).read_bytes()).hexdigest()
    assert says("compile", config, "--out", code, *placed).split()[-1] == digest
    other = ("--mesh", "data=4,model=2", "--rules", "embed=data,mlp=model")
    assert "made for the mesh" in says("compile", config, "--out", code, *other, code=1)
    init = ("init", config, "--format", "orbax", *placed)
    said = says(*init, "--out", plain)
    given = ("--executables", code, "--executables-sha256", digest)
    assert says(*init, "--out", loaded, *given).split()[-1] == said.split()[-1]
    wrong = (*given[:-1], digest[::-1])
    for arguments, error, status in (
        (wrong, "its SHA-256 is", 1),
        (given[:2], "both or neither", 2),
        ((*given, "--seed", "1", "--mesh", "data=4,model=2"), "made for the mesh", 1),
    ):
        out = str(tmp_path / "none")
        assert error in says(*init, "--out", out, *arguments, code=status)
    said = says("init", config, "--out", out, *given, code=2)
    assert "it means nothing with --format safetensors" in said
    assert not os.path.exists(out)


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
@pytest.mark.slow
def test_ctrl_c_says_what_is_kept_and_the_same_command_goes_on(tmp_path, config, says):
    large = TINY | {"vocab_size": 32000, "hidden_size": 512, "num_hidden_layers": 24}
    (tmp_path / "large.json").write_text(json.dumps(large))
    out = tmp_path / "made"
    # Python does not listen where a parent told its children to ignore SIGINT.
    listening = (
        "import signal\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from shardinit.__main__ import main\n"
        "main()"
    )
    command = ["init", str(tmp_path / "large.json"), "--out", str(out)]
    with subprocess.Popen(
        [sys.executable, "-c", listening, *command], stderr=subprocess.PIPE, text=True
    ) as running:
        while not list(tmp_path.glob("made.unfinished/*.safetensors")):
            assert running.poll() is None
            time.sleep(0.01)
        running.send_signal(signal.SIGINT)
        said = running.communicate(timeout=60)[1]
    assert running.returncode == 130
    assert f"kept in {out}.unfinished; the same command again goes on" in said
    assert "Traceback" not in said
    assert Path(f"{out}.unfinished").is_dir()
    assert "wrote" in says(*command)


def test_tensors_have_the_names_of_transformers(tmp_path, config, expected, says):
    out, receipt = str(tmp_path / "hf"), str(tmp_path / "hf.receipt.json")
    command = ("init", config, "--out", out, "--seed", "5", "--names", "hf")
    root = lib.digest(expected).root
    assert root in says(*command)
    arrays = safetensors.numpy.load_file(tmp_path / "hf" / "model.safetensors")
    up = np.asarray(expected["layers"][0]["mlp"]["up"]["kernel"])
    assert np.array_equal(arrays["model.layers.0.mlp.up_proj.weight"], up.T)
    described = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert described["architectures"] == ["LlamaForCausalLM"]
    assert "is there already, and verified" in says(*command)
    os.unlink(receipt)
    assert root in says(*command)  # compared, and the receipt made anew
    assert root in says("verify", receipt, out, "--names", "hf")
    assert "is missing" in says("verify", receipt, out, code=3)
    error = says(*command[:-2], code=1)
    assert "not those of its receipt" in error
    error = says(
        "init", config, "--out", out + "2", "--names", "hf", "--format", "orbax", code=2
    )
    assert "--names: it means nothing with --format orbax" in error


def test_tensors_have_names_of_ones_own(tmp_path, says, monkeypatch):
    (tmp_path / "mine_named.py").write_text(
        "import jax\n"
        "def init(key):\n"
        "    return {'w': jax.random.normal(key, (8, 32)), 'b': jax.numpy.zeros(32)}\n"
    )
    monkeypatch.chdir(tmp_path)
    lines = tmp_path / "names.txt"
    lines.write_text("w -> linear.weight : transpose\nb -> linear.bias\n")
    said = says("init", "mine_named:init", "--out", "made", "--names", str(lines))
    arrays = safetensors.numpy.load_file("made/model.safetensors")
    assert arrays["linear.weight"].shape == (32, 8)
    assert said.split()[-1] in says(
        "verify", "made.receipt.json", "made", "--names", str(lines)
    )
    lines.write_text("w -> linear.weight : transpose\n")
    command = ("init", "mine_named:init", "--out", "other", "--names", str(lines))
    assert "no line renames it" in says(*command, code=1)
    command = ("init", "mine_named:init", "--out", "other", "--names", "none.txt")
    assert "names='none.txt': it cannot be read" in says(*command, code=1)
