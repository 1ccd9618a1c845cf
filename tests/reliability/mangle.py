"""Program files that somebody damaged, or altered and sealed anew.

    python -m tests.reliability.mangle --parsed 100000 --executed 2000

A file that is read may be refused and nothing else. One that was sealed anew is
uploaded: the service compiles it in a process of its own, may refuse it, and goes on.
"""

import argparse
import hashlib
import random
import time
import zlib
from collections import Counter

import jax
from google.protobuf.message import DecodeError

import shardinit
from shardinit.bench.server import server
from shardinit.errors import ProgramFormatError, ServiceError, SpecError
from shardinit.v1 import program_pb2 as pb
from tests.reliability.fuzz import mangled


def program():
    """A program with leaves of several kinds."""

    def init(key):
        a, b = jax.random.split(key)
        return {
            "drawn": jax.random.normal(a, (8, 64)),
            "deep": [{"zeros": jax.numpy.zeros((16,))}],
            "whole": jax.random.orthogonal(b, 8),
        }

    return shardinit.export_plan(init)


def sealed(content):
    """An envelope that vouches for whatever it holds."""
    return pb.InitProgram(
        format=2,
        sha256=hashlib.sha256(content).digest(),
        content=zlib.compress(content),
        compression=pb.COMPRESSION_ZLIB,
        content_size=len(content),
    ).SerializeToString()


def altered(content, chance):
    """An envelope around a content whose message was changed, its modules not."""
    message = pb.InitProgramContent.FromString(content)
    modules = [function.module for function in message.functions]
    for function in message.functions:
        function.module = b""
    data = mangled(message.SerializeToString(), chance)
    try:
        message = pb.InitProgramContent.FromString(data)
    except DecodeError:  # sealed as it is
        return sealed(data)
    for function, module in zip(message.functions, modules, strict=False):
        function.module = module
    return sealed(message.SerializeToString())


def turned(content, chance):
    """An envelope around a content in which a bit of a module is another.

    Only a compiler can tell, since the module's own digest is right. It may crash.
    """
    message = pb.InitProgramContent.FromString(content)
    function = chance.choice([x for x in message.functions if x.module])
    module = bytearray(function.module)
    module[chance.randrange(len(module))] ^= 1 << chance.randrange(8)
    function.module = bytes(module)
    function.module_sha256 = hashlib.sha256(module).digest()
    return sealed(message.SerializeToString())


def parse(count, seed=0):
    """Reads damaged files, half of them sealed anew: how many were refused."""
    chance = random.Random(seed)
    made = program()
    data, ends = made.to_bytes(), Counter()
    for number in range(count):
        damaged = mangled(data, chance) if number % 2 else altered(made.content, chance)
        try:
            shardinit.InitProgram.from_bytes(damaged)
            ends["read"] += 1
        except ProgramFormatError:
            ends["refused"] += 1
    return ends


def execute(count, seed=0):
    """Uploads altered files, modules too, and runs those that are taken."""
    chance = random.Random(seed)
    content, ends = program().content, Counter()
    with (
        server("--allow-upload", "--log-level", "error") as (address, _),
        shardinit.connect(address, timeout=120) as client,
    ):
        for number in range(count):
            change = altered if number % 2 else turned
            data = change(content, chance)
            digest = hashlib.sha256(_content(data)).hexdigest()
            try:
                client._programs.upload(data, digest)
                for path in client.numpy(digest, 0):
                    assert path
                ends["executed"] += 1
            except (ServiceError, SpecError) as error:
                ends[getattr(error, "code", "") or "INVALID_ARGUMENT"] += 1
        client.models()
    return ends


def _content(data):
    return zlib.decompress(pb.InitProgram.FromString(data).content)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parsed", type=int, default=1000)
    parser.add_argument("--executed", type=int, default=10)
    given = parser.parse_args()
    for what, count in ((parse, given.parsed), (execute, given.executed)):
        begin = time.monotonic()
        ends = dict(what(count))
        print(f"{what.__name__} {count:,}: {ends} in {time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    main()
