import io
import json
import os
import signal
import subprocess
import sys
import time

import jax
import pytest

from shardinit import cli
from shardinit.cli import arguments, options
from shardinit.cli.outcomes import UsageError
from shardinit.core.plan.rules import fsdp

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


COMMANDS = ((), ("plan",), ("init",), ("serve",), ("client",), ("client", "stream"))


def environment():
    return {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}


def shardinit(*args, code=0):
    done = subprocess.run(
        [sys.executable, "-m", "shardinit", *args],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=120,
    )
    assert "Traceback" not in done.stdout + done.stderr
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


@pytest.fixture
def fails(monkeypatch, capsys):
    """Runs the command line in this process; what it says when it fails."""

    def run(*args, code=1):
        monkeypatch.setattr(sys, "argv", ["shardinit", *args])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert caught.value.code == code
        return capsys.readouterr().err

    return run


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(TINY))
    return str(path)


def test_plan_of_an_example_needs_no_devices():
    text = shardinit(
        "plan", "gpt2", "--mesh", "data=64,model=8", "--rules", "embed=data,mlp=model"
    )
    assert "124,439,808 elements" in text
    assert "P('data', 'model')" in text


def test_plan_as_json_lists_every_leaf(config):
    rules = "vocab=model,embed=data,mlp=data+model,norm="
    data = json.loads(
        shardinit(
            "plan", config, "--mesh", "data=2,model=4", "--rules", rules, "--json"
        )
    )
    assert data["mesh"] == {"data": 2, "model": 4}
    leaves = {leaf["path"]: leaf for leaf in data["leaves"]}
    assert leaves["embed/embedding"]["shape"] == [256, 64]
    assert leaves["embed/embedding"]["sharding"] == [["model"], ["data"]]
    assert leaves["embed/embedding"]["bytes_per_device"] * 8 == 256 * 64 * 4
    assert (
        sum(x["bytes_per_device"] for x in leaves.values())
        == (data["bytes_per_device"])
    )


@pytest.mark.slow
def test_plan_takes_what_a_plan_may_be_told(config, fails):
    odd = ("plan", config, "--mesh", "data=3", "--rules", "vocab=data")
    assert "does not divide" in fails(*odd) or "multiple of 3" in fails(*odd)
    data = json.loads(shardinit(*odd, "--indivisible", "next", "--json"))
    assert {"replicated"} <= {found["kind"] for found in data["findings"]}
    strict = fails(*odd, "--indivisible", "next", "--strict", "replicated")
    assert "none of replicated" in strict
    assert "memory_limit=1,024 bytes" in fails("plan", config, "--memory-limit", "1KiB")
    assert "bytes, such as" in fails("plan", config, "--memory-limit", "much", code=2)
    assert "kinds of findings" in fails("plan", config, "--strict", "loud", code=2)
    chosen = ("--select", "embed/**", "--prng", "threefry")
    text = shardinit("plan", config, *chosen)
    assert "16,384" in text


def test_models_lists_config_keys():
    text = shardinit("models")
    assert "specs by name: " in text
    assert "llama-3.1-405b" in text.split("decoder")[0]
    assert "decoder" in text
    assert "num_hidden_layers" in text


def test_models_of_the_operator_are_registered(tmp_path, monkeypatch):
    (tmp_path / "our_models.py").write_text(
        "from shardinit.models import register\n"
        "@register('ours', schema={'properties': {'width': {'type': 'integer'}}})\n"
        "def build(config):\n"
        "    raise NotImplementedError\n"
    )
    paths = [str(tmp_path), os.getcwd()]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    found = json.loads(shardinit("models", "--models", "our_models", "--json"))
    assert found["ours"]["properties"]["width"] == {"type": "integer"}
    text = shardinit("models", "--models", "our_models")
    assert "ours" in text
    assert "width" in text


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["plan", "no-such"], "no example config is named 'no-such'"),
        (["plan", "gpt3"], "(did you mean 'gpt2'?)"),
        (["export", "gpt2", "-o", "x" * 300], "File name too long"),
        (["init", "gpt2", "--out", "x" * 250], "File name too long"),
        (["plan", "gpt2", "--model", "nope"], "no model is registered as 'nope'"),
        (["plan", "gpt2", "--mesh", "a=7", "--rules", "vocab=a"], "does not divide"),
        (["plan", "gpt2", "--rules", "vocab=expert"], "'expert'"),
        (["serve", "--listen", "0.0.0.0:1"], "from other machines, without TLS"),
        (["serve", "--models", "no_such_module"], "No module named"),
        (["models", "--models", "json"], "registers no model"),
    ],
)
def test_what_is_wrong_is_one_message_and_exit_code_1(args, message, fails):
    text = shardinit(*args, code=1) if args[0] == "serve" else fails(*args)
    assert text.startswith("error: ")
    assert message in text


@pytest.mark.parametrize(
    ("words", "option"),
    [
        ("plan gpt2 --mesh data", "--mesh"),
        ("plan gpt2 --rules embed", "--rules"),
        ("plan gpt2 --opt-rules embed", "--opt-rules"),
        ("plan gpt2 --memory-limit much", "--memory-limit"),
        ("plan gpt2 --strict loud", "--strict"),
        ("plan gpt2 --statistics", "--statistics"),
        ("inspect gpt2 --memory-limit 0", "--memory-limit"),
        ("init gpt2 --out made --max-memory 1XB", "--max-memory"),
        ("init gpt2 --out made --mesh data=2", "--mesh"),
        ("init gpt2 --out made --format orbax --names hf", "--names"),
        ("init gpt2 --out made --format orbax --distributed here", "--distributed"),
        ("read gpt2 wte/embedding 0:4:0", "window"),
        ("serve --log-level loud", "--log-level"),
        ("serve --log-format xml", "--log-format"),
    ],
)
def test_an_option_that_reads_wrong_is_exit_code_2(words, option, fails, tmp_path):
    text = fails(*words.replace("made", str(tmp_path / "made")).split(), code=2)
    assert text.startswith(f"error: {option}: ")
    assert not list(tmp_path.iterdir())


def test_an_empty_standard_input_is_said(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"")))
    assert "standard input is empty" in shardinit("plan", "-", code=4)


def test_a_faulty_config_shows_every_fault(tmp_path, fails):
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(TINY | {"hiden_size": 1, "num_attention_heads": 7}))
    text = fails("plan", str(path))
    assert "hiden_size" in text
    assert "num_attention_heads" in text


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe", b'{"a":' * 100_000])
def test_a_file_that_is_no_config_is_one_message(tmp_path, content, fails):
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    assert fails("plan", str(path), code=4).startswith("error: ")
    assert "Traceback" in fails("--debug", "plan", str(path), code=4)
    assert "Traceback" in fails("plan", str(path), "--debug", code=4)
    assert "cannot read" in fails("plan", str(tmp_path / "missing.json"), code=4)


def test_a_wrong_option_is_exit_code_2(fails):
    assert "No such option" in fails("plan", "gpt2", "--bogus", code=2)
    assert "--seed" in fails("read", "gpt2", "--seed", str(1 << 63), code=2)


@pytest.mark.parametrize(
    "text", ["", "a", "a=0", "a=-1", "a=1,a=2", "=2", "a=1,", "a=²"]
)
def test_a_mesh_that_does_not_read_as_one_is_refused(text):
    with pytest.raises(UsageError, match="--mesh"):
        arguments.parse_mesh(text)


def test_rules_read_as_written():
    rules = arguments.parse_rules("embed=data, mlp=data+model,norm=")
    expected = (("embed", ("data",)), ("mlp", ("data", "model")), ("norm", None))
    assert rules.rules == expected
    assert arguments.parse_rules("fsdp:data+model") == fsdp("data", "model")
    assert arguments.parse_rules("fsdp") == fsdp()


def test_optimizer_state_and_wide_draws_are_placed_as_they_were_typed():
    def init(key):
        wide = jax.random.normal(key, (512, 512), jax.numpy.bfloat16)
        return {"w": wide, "moment": jax.numpy.zeros((512, 512))}

    mesh = arguments.abstract_mesh({"data": 2, "model": 4})
    told = ("fsdp:model", None, None, "error", None, None, "float32")
    state = ("fsdp:data", "pinned_host", ["mom*"])
    plan = options.planned(init, mesh, options.Asked(*told, state))
    moment, w = (leaf.sharding for leaf in plan.leaves)
    assert (tuple(moment.spec), tuple(w.spec)) == (("model", "data"), ("model",))
    assert moment.memory_kind == "pinned_host"
    assert "narrow-draw" not in {found.kind for found in plan.findings}


def children(parent):
    """Processes that ``parent`` started and that still run."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat") as file:
                state, ppid = file.read().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if int(ppid) == parent and state != "Z":
            found.append(int(name))
    return found


def alive(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_the_demo_checks_its_leaves_and_ends_by_itself(config):
    text = shardinit("demo", "--config", config)
    assert "initialise: " in text
    assert "leaves equal plain jax.jit bit for bit" in text
    assert "nothing is left running" in text


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="looks for processes in /proc")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (15, 143)])
def test_an_interrupted_demo_leaves_nothing_running(config, number, code):
    with subprocess.Popen(
        [sys.executable, "-m", "shardinit", "demo", "--config", config],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    ) as process:
        for line in process.stdout:
            if line.startswith("3."):
                break
        started = time.monotonic()
        while len(children(process.pid)) < 2 and time.monotonic() - started < 20:
            time.sleep(0.02)
        running = children(process.pid)
        assert len(running) == 2
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in out + err
    assert not any(map(alive, running))


def test_a_demo_of_a_faulty_config_is_one_message(tmp_path):
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(TINY | {"hidden_size": -1}))
    assert "hidden_size" in shardinit("demo", "--config", str(path), code=1)


@pytest.mark.slow
def test_export_and_read(config, tmp_path, fails):
    path = str(tmp_path / "tiny.program")
    said = shardinit("export", config, "--out", path)
    assert "leaves" in said
    assert "sha256" in said
    paths = [line.split("\t")[0] for line in shardinit("read", path).splitlines()]
    assert paths == [
        line.split("\t")[0] for line in shardinit("read", config).splitlines()
    ]
    leaf = next(p for p in paths if "embed" in p)
    npy = str(tmp_path / "window.npy")
    shardinit("read", path, leaf, "3:9,::2", "--seed", "5", "--out", npy)
    import numpy as np

    from shardinit import load_program, open

    want = open(load_program(path), 5)[leaf][3:9, ::2]
    assert np.load(npy).tobytes() == np.ascontiguousarray(want).tobytes()
    assert "[6, 32]" in shardinit("read", path, leaf, "3:9,::2")
    before = os.stat(path).st_mtime_ns
    assert "is there already" in shardinit("export", config, "--out", path)
    assert os.stat(path).st_mtime_ns == before
    other = tmp_path / "other.json"
    other.write_text(json.dumps(TINY | {"hidden_size": 128}))
    assert "it exists" in fails("export", str(other), "--out", path)
    assert "it exists" not in shardinit("export", config, "--out", path, "--force")
    assert "none of the" in fails("read", path, "no/such/leaf")
    assert "out of bounds" in fails("read", path, leaf, "99999")
    assert "'a' in '1,a'" in fails("read", path, leaf, "1,a", code=2)
    (tmp_path / "broken").write_bytes(b"not a program")
    assert "init program" in fails("read", str(tmp_path / "broken"), code=4)
    shardinit("read", path, leaf, "3:9,::2", "--seed", "5", "--out", npy)  # again
    assert "File exists" in fails("read", path, leaf, "--out", npy)


@pytest.mark.slow
def test_export_compile_and_read_say_the_same_as_json(config, tmp_path):
    path, code = str(tmp_path / "model.program"), str(tmp_path / "code")
    wrote = json.loads(shardinit("export", config, "--out", path, "--json"))
    assert (wrote["out"], wrote["bytes"]) == (path, os.path.getsize(path))
    assert wrote["written"]
    again = json.loads(shardinit("export", config, "--out", path, "--json"))
    assert again == {**wrote, "written": False}
    leaves = json.loads(shardinit("read", path, "--json"))
    assert len(leaves) == wrote["leaves"]
    assert leaves[0]["shape"] == [256, 64]
    leaf, index = leaves[0]["path"], "3:9,::32"
    window = json.loads(shardinit("read", path, leaf, index, "--json"))
    from shardinit import load_program, open

    want = open(load_program(path), 0)[leaf][3:9, ::32]
    assert window["values"] == want.astype(float).tolist()
    npy = str(tmp_path / "window.npy")
    said = json.loads(shardinit("read", path, leaf, index, "-o", npy, "--json"))
    assert said == {"path": leaf, "dtype": window["dtype"], "shape": [6, 2], "out": npy}
    made = json.loads(shardinit("compile", path, "--out", code, "--json"))
    assert made["bytes"] == os.path.getsize(code)
    assert set(made) == {"out", "bytes", "programs", "sha256"}


@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
def test_ctrl_c_counts_while_the_collector_runs():
    code = (
        "import sys, time, _thread\n"
        "from shardinit import cli\n"
        "from shardinit.cli import outcomes\n"
        "class Swallows:\n"
        "    def __del__(self):\n"
        "        raise KeyboardInterrupt\n"
        "def command():\n"
        "    outcomes.keep_interrupts()\n"
        "    Swallows()\n"
        "    time.sleep(60)\n"
        "outcomes.end_with_code(command, debug=lambda: False)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 130, done.stderr
    assert "interrupted. Nothing was written" in done.stderr


def test_ctrl_c_counts_while_the_command_line_is_imported(monkeypatch, capsys):
    from shardinit import __main__ as entry

    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(entry, "_run", interrupted)
    with pytest.raises(SystemExit) as caught:
        entry.main()
    assert caught.value.code == 130
    assert "interrupted" in capsys.readouterr().err


def test_version_and_short_help():
    from importlib.metadata import version

    import shardinit as package

    said = shardinit("--version")
    assert package.__version__ in said
    assert f"jax {version('jax')}" in said
    assert "Usage:" in shardinit("plan", "-h")


@pytest.mark.slow
def test_a_spec_is_a_name_a_file_json_or_standard_input(config, tmp_path, monkeypatch):
    from shardinit import ModelSpec, export_plan
    from shardinit.models import build

    wanted = shardinit("plan", config)
    assert shardinit("plan", json.dumps(TINY)) == wanted
    program = export_plan(build(ModelSpec("decoder", TINY))).to_bytes()
    for content in (json.dumps(TINY).encode(), program):
        done = subprocess.run(
            [sys.executable, "-m", "shardinit", "plan", "-"],
            input=content,
            capture_output=True,
            env=environment(),
            check=True,
        )
        assert done.stdout.decode() == wanted


@pytest.mark.parametrize("command", ["export", "compile", "init", "read"])
def test_targets_are_looked_at_before_the_model(command, tmp_path, fails):
    leaf = ("embed/embedding",) if command == "read" else ()
    out = tmp_path / "no" / "such" / "made"
    said = fails(command, "no-such-model", *leaf, "--out", str(out))
    assert f"mkdir -p {out.parent}" in said
    (tmp_path / "file").touch()
    inside = str(tmp_path / "file" / "made")
    assert "Not a directory" in fails(command, "no-such-model", *leaf, "-o", inside)
    if command != "init":
        taken = fails(command, "no-such-model", *leaf, "-o", str(tmp_path))
        assert "it is a folder" in taken


def test_a_reader_that_has_enough_is_no_error(config):
    command = f"{sys.executable} -m shardinit plan {config} --json | head -1"
    done = subprocess.run(
        command, shell=True, capture_output=True, text=True, env=environment()
    )
    assert (done.stdout, done.stderr) == ("{\n", "")


@pytest.mark.skipif(os.name != "posix", reason="opens a pseudo-terminal")
@pytest.mark.parametrize("columns", [60, 80])
@pytest.mark.parametrize(
    "command",
    [
        ("plan", "gpt2", "--mesh", "data=8", "--rules", "embed=data"),
        ("models",),
        ("audit", "gpt2", "--topology", "cpu:2", "--select", "embed/**"),
    ],
)
@pytest.mark.few(2)
def test_a_table_is_no_wider_than_the_terminal(command, columns):
    import fcntl
    import pty
    import re
    import struct
    import termios

    here, there = pty.openpty()
    fcntl.ioctl(there, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    with subprocess.Popen(
        [sys.executable, "-m", "shardinit", *command],
        stdin=there,
        stdout=there,
        stderr=subprocess.DEVNULL,
        env=environment() | {"COLUMNS": str(columns)},
    ):
        os.close(there)
        said = b""
        try:
            while piece := os.read(here, 1 << 16):
                said += piece
        except OSError:  # the end of a terminal
            pass
    os.close(here)
    shown = said.decode().replace("\r\n", "\n")
    assert max(map(len, shown.splitlines())) <= columns
    for number in re.findall(r"\d[\d,]*,\d{3}", shardinit(*command)):
        assert number in shown


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help_cuts_nothing_off_where_it_is_narrow(words, monkeypatch, capsys):
    def said(columns):
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setattr(sys, "argv", ["shardinit", *words, "-h"])
        with pytest.raises(SystemExit):
            cli.main()
        lines = capsys.readouterr().out.splitlines()
        return max(map(len, lines)), "".join("".join(lines).split())

    narrow, text = said(60)
    assert narrow <= 60
    assert "…" not in text
    assert sorted(text) == sorted(said(200)[1])


def test_help_of_a_command_that_there_is_none_is_no_help(fails):
    assert "No such command 'inti'" in fails("inti", "-h", code=2)


def test_names_that_are_no_text_are_shown_escaped(fails, tmp_path, monkeypatch):
    said = fails("plan", os.fsdecode(b"\xff.json"), code=4)
    assert "cannot read" in said
    made = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    (tmp_path / "accents.py").write_text(
        "import jax\ndef init(key):\n"
        "    return {'\\xfc': jax.random.normal(key, (8, 32))}\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "stdout", made)
    monkeypatch.setattr(sys, "argv", ["shardinit", "plan", "accents:init"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert not caught.value.code
    made.flush()
    assert b"\\xfc" in made.buffer.getvalue()
