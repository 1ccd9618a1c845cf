"""A server on a free port, a client of it, and a small model that both know."""

import os
import pathlib
import time

import jax
import jax.numpy as jnp
import pytest

import shardinit
from shardinit.core.init_fn import InitFn
from shardinit.errors import SpecError
from shardinit.models import ModelSpec, register
from shardinit.service.server.server import Server
from shardinit.service.wire.messages import spec_to_proto
from shardinit.v1 import service_pb2

SCHEMA = {
    "type": "object",
    "properties": {"width": {"type": "integer", "description": "columns"}},
    "required": ["width"],
}


@register("service-test", schema=SCHEMA)
def build(config):
    faults = [(k, "unknown key") for k in config if k not in ("width", "fail")]
    if not isinstance(config.get("width"), int):
        faults.append(("width", "expected an integer"))
    if faults:
        raise SpecError("service-test", faults)
    if config.get("fail"):
        raise RuntimeError("secret of the operator")
    width = config["width"]

    def init(key):
        a, b = jax.random.split(key)
        return {
            "layer": [
                {"kernel": jax.random.normal(k, (8, width))}
                for k in jax.random.split(a, 2)
            ],
            "head": jax.random.uniform(b, (width, 32), jnp.bfloat16),
            "bias": jnp.zeros((width,)),
        }

    axes = {
        "layer": [{"kernel": ("in", "out")} for _ in range(2)],
        "head": ("out", None),
        "bias": ("out",),
    }
    return InitFn(init, axes=axes, name="service-test")


@register("service-streams")
def build_streams(config):
    """Takes a key for each of two streams, and has a moment of its parameter."""

    def init(keys):
        return {
            "w": jax.random.normal(keys["params"], (64, 64), jnp.bfloat16),
            "noise": jax.random.uniform(keys["noise"], (8, 64)),
            "moment": jnp.zeros((64, 64)),
        }

    return InitFn(init, axes=dict.fromkeys(("w", "noise", "moment"), ("in", "out")))


@register("service-waits")
def build_waiting(config):
    """Says in a file that it is being built, and is when another file is there."""
    folder = pathlib.Path(config["folder"])
    with (folder / "begun").open("a") as begun:
        begun.write(f"{os.getpid()}\n")
    while not (folder / "go").exists():
        time.sleep(0.02)
    return build({"width": config.get("width", 64)})


@register("service-traced")
def build_traced(config):
    """Has its worker note the traces of spans that end from here on in a file."""
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter

    class Noted(SpanExporter):
        def export(self, spans):
            with open(config["file"], "a") as file:
                for span in spans:
                    parent = f"{span.parent.span_id:016x}" if span.parent else "none"
                    name, number = span.name, f"{span.context.trace_id:032x}"
                    file.write(f"{name} {number} {parent}\n")

    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(Noted()))
    trace.set_tracer_provider(provider)
    return InitFn(lambda key: {"w": jax.random.bits(key, (config["width"],))})


class Gate:
    """A folder between a test and the builds that wait for it."""

    def __init__(self, folder):
        self.folder = folder

    def spec(self, width=64):
        config = {"folder": str(self.folder), "width": width}
        return ModelSpec("service-waits", config)

    def request(self, width=64):
        spec = spec_to_proto(self.spec(width))
        return service_pb2.DescribeModelRequest(spec=spec)

    @property
    def begun(self):
        """Processes of the builds that have begun."""
        path = self.folder / "begun"
        return path.read_text().split() if path.exists() else []

    def open(self):
        (self.folder / "go").touch()


@pytest.fixture
def gate(tmp_path):
    folder = tmp_path / "gate"
    folder.mkdir()
    yield Gate(folder)
    (folder / "go").touch()


def until(condition, seconds=20):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


@pytest.fixture
def spec():
    return ModelSpec("service-test", {"width": 64})


@pytest.fixture(scope="session")
def server():
    with Server() as running:
        yield running


@pytest.fixture
def client(server, tmp_path):
    with shardinit.connect(
        server.address, timeout=30, cache_dir=tmp_path / "cache"
    ) as made:
        yield made
