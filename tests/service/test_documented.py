"""What the documentation says of limits and metrics is what the server has."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from shardinit.service.server.config import Config
from shardinit.service.server.telemetry import Metrics
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


def test_every_metric_is_told():
    metrics = Metrics()
    metrics.watch("workers", "", int)
    metrics.watch("queue_waiting", "", int)
    metrics.watch("cache_bytes", "", int)
    told = set(re.findall(r"`(shardinit_\w+)`", TEXT))
    ours = {
        family.name + "_total" * (family.type == "counter")
        for family in metrics.registry.collect()
        if family.name.startswith("shardinit_")
    }
    assert told == ours
