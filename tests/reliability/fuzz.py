"""Messages that are nearly right, over every call: what the service says to them.

    python -m tests.reliability.fuzz --messages 1000000

A message is a valid one with bytes of it changed, left out, doubled or added. Nothing
may be INTERNAL or UNKNOWN, the process that listens stays, and does not grow.
"""

import argparse
import random
import threading
import time
from collections import Counter

import grpc

from shardinit.bench.server import memory, server
from shardinit.service.wire.versions import SERVICE
from shardinit.v1 import service_pb2, spec_pb2
from tests.reliability.clients import constant, decoder

MESSAGES = 5  # of an answer, at most: what was asked may be a terabyte


def samples():
    """A valid message for each call, by its name."""
    spec, key = constant(8), service_pb2.RootKey(seed=3)
    mesh = spec_pb2.MeshSpec(axes=[spec_pb2.MeshAxis(name="data", size=2)])
    rules = spec_pb2.ShardingRules()
    rules.path_rules.rules.add(pattern=".*/kernel")
    made = service_pb2
    window = made.Window(path="w", start=[0, 0], shape=[2, 4096])
    return {
        "GetVersion": made.GetVersionRequest(min=1, max=1),
        "ListModels": made.ListModelsRequest(),
        "DescribeModel": made.DescribeModelRequest(
            spec=decoder(1), mesh=mesh, rules=rules
        ),
        "GetProgram": made.GetProgramRequest(spec=spec, jax_version="0.10.2"),
        "StreamShards": made.StreamShardsRequest(spec=spec, key=key, windows=[window]),
        "WriteCheckpoint": made.WriteCheckpointRequest(
            spec=spec, key=key, uri="/nowhere/name", format=1
        ),
        "UploadProgram": made.UploadProgramRequest(
            header=made.UploadHeader(size=100, sha256=bytes(32))
        ),
    }


def mangled(data, chance):
    """A message with one to four things wrong with it."""
    out = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        at = chance.randint(0, len(out))
        how = chance.randrange(5)
        if how == 0:
            out[at : at + 1] = bytes([chance.randrange(256)])
        elif how == 1:
            del out[at : at + chance.randint(1, 8)]
        elif how == 2:
            out[at:at] = out[at : at + chance.randint(1, 32)]
        elif how == 3:
            out[at:at] = chance.randbytes(chance.randint(1, 16))
        elif out and at < len(out):
            out[at] ^= 1 << chance.randrange(8)
    return bytes(out)


def send(address, count, seed, codes):
    """Sends mangled messages, one call each, and counts what they end with."""
    chance = random.Random(seed)
    valid = {name: m.SerializeToString() for name, m in samples().items()}
    with grpc.insecure_channel(address) as channel:
        calls = {n: channel.stream_stream(f"/{SERVICE}/{n}") for n in valid}
        for _ in range(count):
            name = chance.choice(list(valid))
            messages = [
                mangled(valid[name], chance) for _ in range(chance.choice((1, 1, 2)))
            ]
            answers = calls[name](iter(messages), timeout=20)
            try:
                for number, _ in enumerate(answers):
                    if number == MESSAGES:
                        answers.cancel()
                codes["OK"] += 1
            except grpc.RpcError as error:
                codes[error.code().name] += 1


def measure(count, threads=8):
    """Codes by how often they came, and bytes by which the front has grown."""
    codes = Counter()
    with server("--allow-upload", "--log-level", "error") as (address, pid):
        send(address, 200, "warm", Counter())
        before = memory(pid, "VmRSS")
        parts = [count // threads + (i < count % threads) for i in range(threads)]
        running = [
            threading.Thread(target=send, args=(address, part, seed, codes))
            for seed, part in enumerate(parts)
        ]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
        grown = memory(pid, "VmRSS") - before  # and it is there
    return codes, grown


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--messages", type=int, default=10_000)
    given = parser.parse_args()
    begin = time.monotonic()
    codes, grown = measure(given.messages)
    print(f"{sum(codes.values()):,} calls in {time.monotonic() - begin:.0f} s")
    for code, count in codes.most_common():
        print(f"  {code:20} {count:,}")
    print(f"the process that listens has grown by {grown / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
