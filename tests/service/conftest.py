"""A server on a free port, a client of it, and a small model that both know."""

import jax
import jax.numpy as jnp
import pytest

import shardinit
from shardinit.core.init_fn import InitFn
from shardinit.errors import SpecError
from shardinit.models import ModelSpec, register
from shardinit.service.server.server import Server

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
