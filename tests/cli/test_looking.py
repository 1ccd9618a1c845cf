"""``shardinit inspect``, ``pin`` and ``diff`` as a shell has them."""

import json
import sys

import pytest

from shardinit import cli
from shardinit.cli import arguments

pytestmark = pytest.mark.once

TINY = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}

MODULE = """
import jax

SCALE = {scale}


def init(key):
    return {{"{name}": {{"w": SCALE * jax.random.normal(key, (8, 32))}}}}


def factory():
    return init
"""


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs the command line in a folder; exit status, standard output and error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))

    def run(*words):
        sys.modules.pop("mymodel", None)
        sys.path_importer_cache.clear()
        monkeypatch.setattr(sys, "argv", ["shardinit", *words])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        said = capsys.readouterr()
        return caught.value.code or 0, said.out, said.err

    return run


def write(folder, scale, name="mlp"):
    text = MODULE.format(scale=scale, name=name)
    (folder / "mymodel.py").write_text(text + "#" * int(scale * 100))
    for cached in folder.glob("__pycache__/*"):
        cached.unlink()


@pytest.mark.slow
def test_inspect_prints_a_row_for_the_leaves_of_all_layers(run):
    code, out, err = run("inspect", "tiny.json")
    assert (code, err) == (0, "")
    (row,) = (
        line for line in out.splitlines() if "mlp/down" in line and "normal" in line
    )
    assert "layers/{0,1}/mlp/down/kernel" in row
    assert "normal 0.02" in row
    code, out, _ = run("inspect", "tiny.json", "--json", "--select", "**/mlp/*/kernel")
    data = json.loads(out)
    assert len(data["leaves"]) == 6
    assert data["leaves"][0]["law"]["family"] == "normal"


def test_a_local_function_is_inspected_and_a_wrong_one_is_one_message(run, tmp_path):
    write(tmp_path, 0.5)
    for name in ("init", "factory"):
        code, out, _ = run("inspect", f"mymodel:{name}")
        assert code == 0
        assert "normal 0.5" in out
    for wrong in ("mymodel:nothing", "nomodule:init"):
        code, _, err = run("inspect", wrong)
        assert code == 1
        assert "module:function" in err
        assert "Traceback" not in err


def test_what_a_models_code_raises_is_one_message_with_its_line(run, tmp_path):
    (tmp_path / "mymodel.py").write_text(
        "def init(key):\n    raise ValueError('no such layer')\n"
    )
    code, _, err = run("plan", "mymodel:init")
    where = f"{tmp_path}/mymodel.py, line 2, in init"
    assert code == 1
    assert err.startswith(f"error: ValueError: no such layer\n  at {where};")
    (tmp_path / "mymodel.py").write_text("\n\nimport nothing_of_that_name\n")
    code, _, err = run("plan", "mymodel:init")
    assert code == 1
    assert f"({tmp_path}/mymodel.py, line 3, in <module>)" in err


def test_what_our_own_code_raises_keeps_its_traceback(run, monkeypatch):
    monkeypatch.setattr(arguments, "read_source", divmod)  # which takes two
    with pytest.raises(TypeError, match="divmod"):
        run("plan", "gpt2")


def test_a_pin_finds_what_a_change_did(run, tmp_path):
    write(tmp_path, 0.5)
    assert run("pin", "mymodel:init", "pin.json", "--seed", "3")[0] == 0
    code, out, _ = run("diff", "mymodel:init", "--against", "pin.json")
    assert (code, out.splitlines()[-1]) == (0, "the same: 1 leaf of init")
    assert run("pin", "mymodel:init", "pin.json", "--seed", "3")[0] == 0
    write(tmp_path, 0.25)
    code, out, _ = run("diff", "mymodel:init", "--against", "pin.json")
    assert code == 3
    assert "distribution: mlp/w: normal 0.5 -> normal 0.25" in out
    code, out, _ = run("diff", "mymodel:init", "--against", "pin.json", "--json")
    assert code == 3
    assert json.loads(out)["changes"][0]["kind"] == "distribution"
    code, _, err = run("pin", "mymodel:init", "pin.json", "--seed", "3")
    assert code == 1
    assert "--force" in err
    assert run("pin", "mymodel:init", "pin.json", "--force")[0] == 0
    write(tmp_path, 0.25, "ffn")
    code, out, _ = run("diff", "mymodel:init", "--against", "pin.json")
    assert code == 3
    assert "renamed: ffn/w: mlp -> ffn" in out


@pytest.mark.slow
def test_checkpoints_receipts_and_functions_are_held_against_each_other(run):
    assert run("init", "tiny.json", "--out", "made", "--seed", "5")[0] == 0
    for pair in (
        ("made", "made"),
        ("made.receipt.json", "made"),
        ("tiny.json", "made", "--seed", "5"),
    ):
        code, out, err = run("diff", *pair)
        assert (code, err) == (0, ""), out
        assert "the same: 21 leaves" in out
    code, out, _ = run("diff", "tiny.json", "made", "--seed", "6")
    assert code == 3
    assert "values" in out


def test_what_cannot_be_read_has_exit_status_4_and_wrong_usage_2(run, tmp_path):
    (tmp_path / "bad.json").write_text('{"format": "shardinit-pin-0"}')
    assert run("diff", "tiny.json", "--against", "bad.json")[0] == 4
    assert run("diff", "tiny.json")[0] == 2
    assert run("diff", "tiny.json", "tiny.json", "--against", "bad.json")[0] == 2
