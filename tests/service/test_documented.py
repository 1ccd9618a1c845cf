"""What the documentation says of limits and metrics is what the server has."""

import hashlib
import json
import re
import zlib
from inspect import getsource
from pathlib import Path

import crc32c
import grpc
import jax.numpy as jnp
import pytest
import xxhash
from typer.testing import CliRunner

import shardinit
from shardinit import cli
from shardinit.cli import settings
from shardinit.service.client.disk import digest_of
from shardinit.service.server.server import Server
from shardinit.service.wire import errors, frames
from shardinit.service.wire.fields import COUNTS, KEY_TYPES
from shardinit.service.wire.limits import amount
from shardinit.v1 import program_pb2
from shardinit.verify.digest.host import root_digest
from shardinit.verify.receipt_format import seal_of

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
    table = WIRE[WIRE.index("## Test vectors") :]
    told = re.findall(r"^\| .* \| `([\w/~]+)` \|$", table, re.MULTILINE)
    data, tree = bytes(range(16)), {"x": {"a/b~c": jnp.zeros(1)}}
    assert zlib.decompress(_envelope(told[5]).content) == data
    assert told == [
        f"{crc32c.crc32c(b'123456789'):08x}",
        xxhash.xxh3_128(b"").hexdigest(),
        xxhash.xxh3_128(data).hexdigest(),
        shardinit.plan(lambda key: tree).leaves[0].path,
        hashlib.sha256(data).hexdigest(),
        _envelope(told[5]).SerializeToString(deterministic=True).hex(),
        root_digest({"b/w": "1" * 32, "a~1b": "0" * 32}),
        seal_of({"x64": False, "root": "00", "name": "é", "seal": "another"}),
        frames.write(5, memoryview(data)).hex(),
    ]


def _envelope(text):
    """A program file, which is what its digest says."""
    assert (
        digest_of(bytes.fromhex(text)) == hashlib.sha256(bytes(range(16))).hexdigest()
    )
    return program_pb2.InitProgram.FromString(bytes.fromhex(text))


# By call, code and what the details name: the test that provokes it.
PROVOKED = {
    ("any", "INVALID_ARGUMENT", ""): "faults::test_a_spec_of_nothing_and_rules_without",
    ("any", "UNAUTHENTICATED", ""): "refusals::test_what_is_refused_says_why",
    ("any", "PERMISSION_DENIED", "role:upload"): "access::test_a_named_token_has_its",
    ("any", "RESOURCE_EXHAUSTED", "request_bytes"): "access::test_a_message_that_grpc",
    ("any", "RESOURCE_EXHAUSTED", "caller-calls peer-connections"): (
        "operations::test_a_caller_has_so_many_calls operations::test_an_address_has_so"
    ),
    ("any", "DEADLINE_EXCEEDED", "message-seconds"): (
        "operations::test_a_message_that_does_not_come_ends"
    ),
    (
        "any",
        "DEADLINE_EXCEEDED",
        "list-seconds describe-seconds stream-seconds write-seconds upload-seconds",
    ): "pots::test_a_call_ends_at_the_server_s_deadline",
    ("any", "INTERNAL", ""): "faults::test_an_internal_error_says_an_id",
    ("GetVersion", "FAILED_PRECONDITION", ""): "faults::test_no_common_protocol",
    ("of a model", "INVALID_ARGUMENT", ""): "faults::test_faults_are_field_violations",
    (
        "of a model",
        "PERMISSION_DENIED",
        "model",
    ): "access::test_a_caller_has_the_models",
    ("of a model", "NOT_FOUND", ""): "calls::test_a_program_is_asked_for_by_digest",
    ("of a model", "RESOURCE_EXHAUSTED", "queue"): "operations::test_builds_beyond_the",
    ("of a model", "RESOURCE_EXHAUSTED", "build-seconds worker-bytes"): (
        "operations::test_a_build_that_takes_too_much"
    ),
    ("DescribeModel", "RESOURCE_EXHAUSTED", "response_bytes"): (
        "refusals::test_what_is_refused_says_why"
    ),
    ("GetProgram", "RESOURCE_EXHAUSTED", "program_bytes"): (
        "refusals::test_what_is_refused_says_why"
    ),
    ("GetProgram", "FAILED_PRECONDITION", ""): "faults::test_an_older_jax_than_the",
    ("StreamShards", "INVALID_ARGUMENT", ""): (
        "streams::test_a_window_that_is_not_there streams::test_a_resume_beyond_the_end"
    ),
    ("StreamShards", "RESOURCE_EXHAUSTED", "whole-bytes"): (
        "streams::test_a_leaf_that_must_be_whole"
    ),
    ("StreamShards", "RESOURCE_EXHAUSTED", "streams"): (
        "operations::test_streams_beyond_the_limit pots::test_streams_of_one_caller"
    ),
    ("StreamShards", "UNAVAILABLE", ""): "operations::test_a_stream_that_runs_at_the",
    ("WriteCheckpoint", "UNIMPLEMENTED", ""): "checkpoints::test_a_server_without_fold",
    ("WriteCheckpoint", "PERMISSION_DENIED", "place"): (
        "checkpoints::test_nothing_is_written_anywhere"
    ),
    ("WriteCheckpoint", "ALREADY_EXISTS", ""): (
        "checkpoints::test_nothing_is_overwritten checkpoints::test_two_callers_watch"
    ),
    ("WriteCheckpoint", "RESOURCE_EXHAUSTED", "disk"): (
        "checkpoints::test_a_write_that_has_no_room"
    ),
    ("WriteCheckpoint", "RESOURCE_EXHAUSTED", "model-bytes checkpoint-bytes"): (
        "refusals::test_what_is_refused_says_why"
    ),
    ("WriteCheckpoint", "RESOURCE_EXHAUSTED", "writes"): (
        "pots::test_writes_of_one_caller_give_a_place"
    ),
    ("WriteCheckpoint", "UNAVAILABLE", ""): "checkpoints::test_a_stopping_server_hands",
    ("UploadProgram", "UNIMPLEMENTED", ""): "operations::test_an_upload_is_refused",
    ("UploadProgram", "INVALID_ARGUMENT", ""): "operations::test_a_faulty_upload_is",
    ("UploadProgram", "RESOURCE_EXHAUSTED", "cache-bytes"): (
        "operations::test_a_program_that_would_not_be_kept"
    ),
    ("UploadProgram", "RESOURCE_EXHAUSTED", "store"): (
        "caches::test_a_store_that_takes_no_more"
    ),
    ("UploadProgram", "RESOURCE_EXHAUSTED", "upload-bytes"): (
        "pots::test_uploads_of_one_caller_give"
    ),
}


def test_each_error_that_the_protocol_tells_is_provoked_by_a_test():
    rows = re.findall(
        r"^\| ([\w ]+) \| `([A-Z_]+)` \| ([^|]+) \| ?([^|\n]*) ?\|$", WIRE, re.MULTILINE
    )
    told = []
    for call, code, when, details in rows:
        named = (
            details if "`QuotaFailure`" in details or "`denied`" in details else when
        )
        names = re.findall(r"`([a-z_:-]+)`", named)
        names = [name for name in names if name not in ("denied", "jax_version")]
        told.append((call, code, " ".join(names)))
    assert told == list(PROVOKED)
    for tests in PROVOKED.values():
        for test in tests.split():
            file, name = test.split("::")
            text = (ROOT / "tests" / "service" / f"test_{file}.py").read_text()
            assert f"def {name}" in text, test


def test_the_types_of_the_protocol_have_the_bytes_that_it_says():
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| (\d+) \|", WIRE, re.MULTILINE)
    types = {name: int(size) for names, size in rows for name in names.split(", ")}
    assert len(types) == 20
    keys = re.findall(r"^\| `(key<\w+>)` \| `(\w+)` \| (\d) \|", WIRE, re.MULTILINE)
    assert {dtype: (impl, int(words)) for dtype, impl, words in keys} == KEY_TYPES
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
