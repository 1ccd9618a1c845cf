"""``shardinit audit``: what it prints, and the exit status that a script reads."""

import json
import sys

import pytest

from shardinit import cli

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


@pytest.fixture
def audit(tmp_path, monkeypatch, capsys):
    """Runs the command on a tiny model; exit status, standard output and error."""
    config = tmp_path / "config.json"

    def run(*words, **changes):
        config.write_text(json.dumps({**TINY, **changes}))
        monkeypatch.setattr(sys, "argv", ["shardinit", "audit", str(config), *words])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        said = capsys.readouterr()
        return caught.value.code, said.out, said.err

    return run


def test_a_good_plan_has_exit_status_0_and_a_report_as_json(audit):
    code, out, err = audit("--topology", "cpu:4", "--mesh", "data=2,model=2", "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert report["ok"] is True
    assert report["mesh"] == {"data": 2, "model": 2}
    paths = [path for row in report["rows"] for path in row["paths"]]
    assert "layers/1/mlp/up/kernel" in paths
    assert len(paths) == report["leaves"] == 21


@pytest.mark.slow
def test_one_axis_over_all_devices_is_the_default(audit):
    code, out, _ = audit("--topology", "cpu:4")
    assert code == 0
    assert "as {'device': 4}" in out
    assert out.rstrip().endswith("verdict: ok")


@pytest.mark.slow
def test_a_plan_that_fails_has_exit_status_1(audit):
    words = ["--topology", "cpu:4", "--rules", "embed="]
    code, out, _ = audit(*words, vocab_size=1 << 14)
    assert code == 1
    assert "embed/embedding lies whole on each of 4 devices: 4,194,304 bytes" in out
    assert "verdict: FAILS" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--topology", "tpu:v9:2x2"], "a chip of v4, v5e"),
        (["--topology", "cpu:4", "--mesh", "data=3"], "expected 4 devices"),
        (["--topology", "cpu:4", "--rules", "embed=nowhere"], "'nowhere'"),
    ],
)
def test_what_cannot_be_audited_is_one_line(audit, words, said):
    code, out, err = audit(*words)
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert said in err
