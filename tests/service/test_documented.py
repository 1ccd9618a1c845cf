"""What the documentation says of limits and metrics is what the server has."""

import json
import re
from inspect import getsource
from pathlib import Path

import crc32c
import grpc
import jax.numpy as jnp
import pytest
import xxhash
from typer.testing import CliRunner

from shardinit import cli
from shardinit.cli import settings
from shardinit.service.server.server import Server
from shardinit.service.wire import errors, frames
from shardinit.service.wire.fields import COUNTS
from shardinit.service.wire.limits import amount

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "service.md").read_text()
PROTO = (ROOT / "protos" / "shardinit" / "v1" / "service.proto").read_text()
PROTOS = PROTO + (ROOT / "protos" / "shardinit" / "v1" / "spec.proto").read_text()
OF_SERVER = settings.limits_of_server()
OF_REQUEST = settings.limits_of_request()


@pytest.mark.parametrize(("rows", "dash"), [(OF_SERVER, "--"), (OF_REQUEST, "")])
def test_the_operators_tables_are_what_the_fields_say(rows, dash):
    table = [f"| `{dash}{x.name}` | {x.value} | {x.meaning} |" for x in rows]
    assert "| --- | --- | --- |\n{}\n\n".format("\n".join(table)) in TEXT


@pytest.mark.parametrize("rows", [OF_SERVER, OF_REQUEST])
def test_the_protos_tables_are_what_the_fields_say(rows):
    head = PROTO[: PROTO.index("syntax =")]
    comments = " ".join(head.replace("//", " ").split())
    table = " ".join(" ".join(row) for row in rows)
    assert f": {table} " in f"{comments} // "


@pytest.mark.parametrize("width", [60, 80])
def test_help_shows_every_limit_with_its_value_and_meaning(width):
    shown = CliRunner().invoke(cli.app, ["serve", "--help"], terminal_width=width)
    assert max(map(len, shown.output.splitlines())) <= width
    text = " ".join(shown.output.split())
    for row in OF_SERVER:
        assert f" --{' '.join(row)}" in text
    for row in OF_REQUEST:
        assert f" {' '.join(row)}" in text


def test_limits_are_what_their_names_say_in_units():
    rows = {row.name: row.value for row in (*OF_SERVER, *OF_REQUEST)}
    assert rows["request_bytes"] == "1 MiB"
    assert rows["worker-bytes"] == "16 GiB"
    assert rows["write-seconds"] == "604800 s"
    assert (rows["elements"], rows["leaves"]) == ("2^48", "65536")
    assert amount("free_bytes", 1500) == "1500 bytes"
    assert amount("upload_bytes", 0) == "0 bytes"


def test_every_bound_of_a_field_is_named_at_that_field():
    comments = {
        f"{message}.{name}": told
        for message, body in re.findall(r"message (\w+) \{(.*?)\n\}", PROTOS, re.DOTALL)
        for told, name in re.findall(
            r"((?:^ +// .*\n)+) +[\w. ]+ (\w+) = \d+;", body, re.MULTILINE
        )
    }
    for field, (least, limit) in COUNTS.items():
        assert f"`{limit}`" in comments[field], field
        assert ("1 to" in comments[field]) == (least == 1), field
    rest = PROTOS[PROTOS.index("syntax =") :]
    for row in OF_REQUEST:
        assert f"`{row.name}`" in rest, row.name
    assert not re.search(r"\d+ (characters|KiB|MiB)", rest)


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
