"""Clients that behave as badly as they can, one function a way.

Each is called again and again, with an address and a random source, and ends by
itself within a few seconds; what a server says to it is its own affair.
"""

import random
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

import grpc

from shardinit.models import example_config
from shardinit.service.wire.service_pb2_grpc import InitServiceStub
from shardinit.v1 import service_pb2, spec_pb2

ROOT = Path(tempfile.gettempdir()) / "shardinit-reliability"
PATIENCE = 3.0


def named(model, **config):
    made = spec_pb2.ModelSpec(named=spec_pb2.NamedModel(model=model))
    made.named.config.update(config)
    return made


def constant(rows):
    return named("bench-constant", rows=rows)


def decoder(layers, width=64):
    """A decoder of any depth, small in every other way."""
    config = example_config("tinyllama-1.1b") | {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 256,
    }
    return named("decoder", **config)


def half_open(address, chance):
    """Calls whose request never comes."""
    gone = threading.Event()

    def never():
        gone.wait(PATIENCE)
        yield from ()

    with grpc.insecure_channel(address) as channel:
        upload = InitServiceStub(channel).UploadProgram
        calls = [upload.future(never(), timeout=PATIENCE) for _ in range(90)]
        for call in calls:
            call.exception()
        gone.set()


def deaf(address, chance):
    """Streams of a terabyte that nobody reads, more than a connection may have."""
    request = service_pb2.StreamShardsRequest(
        spec=constant(1 << 26),
        key=service_pb2.RootKey(seed=chance.randrange(1 << 30)),
        windows=[service_pb2.Window(path="w")],
    )
    with grpc.insecure_channel(address) as channel:
        stub = InitServiceStub(channel)
        calls = [stub.StreamShards(request, timeout=PATIENCE) for _ in range(300)]
        time.sleep(PATIENCE)
        for call in calls:
            call.cancel()


def patterns(address, chance):
    """As many and as slow regular expressions as a request may have."""
    pattern = ".?" * 100 + f"x{chance.randrange(1 << 20)}"
    rules = spec_pb2.ShardingRules()
    for _ in range(1000):
        rules.path_rules.rules.add(pattern=pattern)
    mesh = spec_pb2.MeshSpec(axes=[spec_pb2.MeshAxis(name="a", size=2)])
    request = service_pb2.DescribeModelRequest(
        spec=decoder(256), mesh=mesh, rules=rules
    )
    with grpc.insecure_channel(address) as channel:
        InitServiceStub(channel).DescribeModel(request, timeout=PATIENCE)


def deep(address, chance):
    """A model of as many layers as there may be, another one each time."""
    request = service_pb2.GetProgramRequest(
        spec=decoder(4096, 4 * chance.randrange(16, 1024))
    )
    with grpc.insecure_channel(address) as channel:
        for _ in InitServiceStub(channel).GetProgram(request, timeout=PATIENCE):
            pass


def uploads(address, chance):
    """Bytes that are announced as a program."""
    data = chance.randbytes(8 << 20)
    header = service_pb2.UploadHeader(size=len(data), sha256=chance.randbytes(32))

    def messages():
        yield service_pb2.UploadProgramRequest(header=header)
        for at in range(0, len(data), 1 << 19):
            chunk = service_pb2.ProgramChunk(offset=at, data=data[at : at + (1 << 19)])
            yield service_pb2.UploadProgramRequest(chunk=chunk)

    with grpc.insecure_channel(address) as channel:
        InitServiceStub(channel).UploadProgram(messages(), timeout=PATIENCE)


def large(address, chance):
    """Requests of nearly a megabyte, each with tens of thousands of faults."""
    request = service_pb2.StreamShardsRequest(
        spec=constant(64), key=service_pb2.RootKey(seed=1)
    )
    request.windows.extend(
        service_pb2.Window(path=f"no{i}", start=[chance.randrange(99)])
        for i in range(60_000)
    )
    with grpc.insecure_channel(address) as channel:
        for _ in InitServiceStub(channel).StreamShards(request, timeout=PATIENCE):
            pass


def checkpoints(address, chance):
    """Checkpoints that are begun and left."""
    request = service_pb2.WriteCheckpointRequest(
        spec=named("bench-random", rows=1 << 16),
        key=service_pb2.RootKey(seed=chance.randrange(1 << 30)),
        uri=str(ROOT / f"{chance.randrange(1 << 40)}"),
        format=service_pb2.CHECKPOINT_FORMAT_SAFETENSORS,
    )
    with grpc.insecure_channel(address) as channel:
        calls = InitServiceStub(channel).WriteCheckpoint(request, timeout=PATIENCE)
        time.sleep(chance.random())
        calls.cancel()


def honest(address, chance):
    """Windows of a model, read to the end."""
    request = service_pb2.StreamShardsRequest(
        spec=named("bench-random", rows=1 << 14),
        key=service_pb2.RootKey(seed=7),
        windows=[service_pb2.Window(path="w", start=[0, 0], shape=[1 << 12, 4096])],
    )
    with grpc.insecure_channel(address) as channel:
        for _ in InitServiceStub(channel).StreamShards(request, timeout=PATIENCE):
            pass


WAYS = (half_open, deaf, patterns, deep, uploads, large, checkpoints, honest)


def misbehave(address, seconds, seed):
    """All ways at once, a thread each, until the time is up."""
    end = time.monotonic() + seconds

    def run(way):
        chance = random.Random(f"{seed} {way.__name__}")
        while time.monotonic() < end:
            with suppress(grpc.RpcError):
                way(address, chance)

    threads = [threading.Thread(target=run, args=(way,)) for way in WAYS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
