"""docs/formats.md names every field of the files, and none that is not there."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import shardinit
from shardinit.v1 import program_pb2
from shardinit.verify.compare.snapshot import LeafSnapshot, Snapshot
from shardinit.verify.receipt import Receipt

pytestmark = pytest.mark.once

PAGE = (Path(__file__).parents[1] / "docs" / "formats.md").read_text()


def documented(title):
    """The names in the first column of the table below a heading."""
    text = re.search(rf"^### {title}\n(.*?)(?=^#|\Z)", PAGE, re.M | re.S)[1]
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    return [name for row in rows for name in re.findall(r"`([^`]+)`", row)]


@pytest.mark.parametrize(
    "name", ["InitProgram", "InitProgramContent", "Leaf", "Function"]
)
def test_every_field_of_a_program_is_documented(name):
    fields = [field.name for field in getattr(program_pb2, name).DESCRIPTOR.fields]
    assert sorted(documented(name)) == sorted(fields)


def test_every_field_of_a_receipt_is_documented():
    fields = [field.name for field in dataclasses.fields(Receipt)]
    assert documented("Receipt") == ["format", "algorithm", *fields]


@pytest.mark.parametrize("kind", [Snapshot, LeafSnapshot])
def test_every_field_of_a_pin_is_documented(kind):
    head = ["format"] if kind is Snapshot else []
    fields = [field.name for field in dataclasses.fields(kind)]
    tail = ["seal"] if kind is Snapshot else []
    assert documented(kind.__name__) == [*head, *fields, *tail]


def test_every_field_of_a_manifest_is_documented(tmp_path):
    plan = shardinit.plan(lambda key: jax.random.normal(key, (8, 32), jnp.float32))
    shardinit.save_executables(plan, tmp_path / "code")
    head, _ = (tmp_path / "code").read_bytes().split(b"\n", 1)
    assert documented("Manifest") == list(json.loads(head))
