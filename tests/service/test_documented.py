"""What the documentation says of limits and metrics is what the server has."""

import json
import re
from dataclasses import fields
from inspect import getsource
from pathlib import Path

import crc32c
import grpc
import jax.numpy as jnp
import pytest
import xxhash

from shardinit.service.server.config import Config
from shardinit.service.server.server import Server
from shardinit.service.wire import errors, frames
from shardinit.service.wire.limits import DEFAULTS

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "service.md").read_text()
PROTO = (ROOT / "protos" / "shardinit" / "v1" / "service.proto").read_text()
UNITS = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def number(text):
    value, _, unit = text.partition(" ")
    if "^" in value:
        base, power = map(int, value.split("^"))
        return base**power
    return float(value) * UNITS[unit]


def test_every_setting_that_is_a_limit_is_in_the_table_with_its_default():
    rows = dict(re.findall(r"^\| `--([a-z-]+)` \| ([^|]+) \|", TEXT, re.MULTILINE))
    assert rows.pop("workers") == "one a core"
    config = Config()
    ours = {
        field.name.replace("_", "-"): getattr(config, field.name)
        for field in fields(Config)
        if type(getattr(config, field.name)) in (int, float) and field.name != "workers"
    }
    assert {name: number(text) for name, text in rows.items()} == ours


@pytest.mark.parametrize(
    "found",
    [
        re.findall(r"^\| `([a-z_]+)` \| (\d[^|]*) \|", TEXT, re.MULTILINE),
        re.findall(r"^//     ([a-z_]+)  +([\d^]+(?: [KMG]iB)?)  ", PROTO, re.MULTILINE),
    ],
    ids=["docs", "proto"],
)
def test_every_limit_of_a_request_is_told_with_its_value(found):
    told = {name: number(text) for name, text in found}
    assert told == {
        field.name: getattr(DEFAULTS, field.name) for field in fields(DEFAULTS)
    }


WIRE = (ROOT / "docs" / "protocol.md").read_text()


def test_the_vectors_of_the_protocol_are_what_is_sent():
    told = dict(
        re.findall(r"^\| ((?:CRC|XXH3|a `).*) \| `(\w+)` \|", WIRE, re.MULTILINE)
    )
    data = bytes(range(16))
    assert list(told.values()) == [
        f"{crc32c.crc32c(b'123456789'):08x}",
        xxhash.xxh3_128(b"").hexdigest(),
        xxhash.xxh3_128(data).hexdigest(),
        frames.write(5, memoryview(data)).hex(),
    ]


def test_the_types_of_the_protocol_have_the_bytes_that_it_says():
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| (\d+) \|", WIRE, re.MULTILINE)
    types = {name: int(size) for names, size in rows for name in names.split(", ")}
    assert len(types) == 20
    for name, size in types.items():
        assert jnp.dtype(name.strip("`")).itemsize == size


def test_the_codes_and_details_of_the_protocol_are_those_there_are():
    codes = {word for word in re.findall(r"`([A-Z][A-Z_]+)`", WIRE) if "_" in word}
    assert codes <= {code.name for code in grpc.StatusCode}
    told = set(
        re.findall(r"^\| `(\w+(?:Info|Request|Failure))` \|", WIRE, re.MULTILINE)
    )
    assert told == set(re.findall(r"error_details_pb2\.(\w+)", getsource(errors)))


@pytest.fixture(scope="module")
def exported():
    """Metrics by name, with the labels that they have."""
    with Server() as server:
        server.metrics.refused.labels("streams")
        server.metrics.killed.labels("died")
        server.metrics.checkpoints.labels("OK")
        server.metrics.calls.labels("GetVersion", "OK")
        server.metrics.active.labels("GetVersion")
        for histogram in (server.metrics.seconds, server.metrics.built):
            histogram.labels("GetVersion")
        families = list(server.metrics.registry.collect())
    return {
        family.name + "_total" * (family.type == "counter"): {
            label for sample in family.samples for label in sample.labels
        }
        for family in families
    }


def test_every_metric_is_told(exported):
    told = set(re.findall(r"`(shardinit_\w+)`", TEXT))
    assert told == {name for name in exported if name.startswith("shardinit_")}


def test_the_dashboard_asks_for_metrics_and_labels_that_are_exported(exported):
    board = json.loads((ROOT / "deploy" / "dashboard.json").read_text())
    shown = set()
    for panel in board["panels"]:
        for target in panel["targets"]:
            words = re.findall(r"(?:shardinit|process)_\w+", target["expr"])
            assert words, target
            by = re.findall(r"by \(([^)]*)\)", target["expr"])
            for word in words:
                name = word.removesuffix("_bucket")
                labels = {label.strip() for label in ",".join(by).split(",")} - {""}
                assert labels <= exported[name] | {"instance"}, target
                shown.add(name)
    assert {name for name in exported if name.startswith("shardinit_")} <= shown
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def test_each_promise_of_the_threat_model_is_held_by_a_test_that_is_there():
    text = (ROOT / "THREAT_MODEL.md").read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text)
    assert len(named) > 15
    for file, test in named:
        assert f"def {test}" in (ROOT / file).read_text(), (file, test)
