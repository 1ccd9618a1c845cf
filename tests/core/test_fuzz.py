"""The loader under fire: whatever comes, one clear refusal, and nothing is run."""

import hashlib
import random
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import shardinit
from shardinit.errors import ProgramFormatError
from shardinit.v1 import program_pb2 as pb

pytestmark = pytest.mark.once

FILES = 100_000
CONTENTS = 20_000


def hosted(key):
    """Every kind of node and key, and leaves that need no function."""
    rows = jax.random.split(jax.random.fold_in(key, 3), 4)
    return {
        "keys": rows[::2],
        "raw": jax.random.key_data(rows[1]),
        "table": np.arange(6, dtype=np.int16).reshape(2, 3),
        "nested": [(np.ones(3, jnp.bfloat16), None), {"5": jnp.int32(1)}],
    }


def model(key):
    return {**hosted(key), "bits": jax.random.bits(key, (4, 8))}


def mutated(data, rng):
    """A file after a few of the accidents that befall files."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        place = rng.randrange(len(data) + 1)
        kind = rng.randrange(5)
        if kind == 0 and place < len(data):
            data[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[place : place + rng.randrange(9)] = rng.randbytes(rng.randrange(9))
        elif kind == 2:
            del data[place:]
        elif kind == 3:
            other = rng.randrange(len(data) + 1)
            data[place:place] = data[other : other + rng.randrange(64)]
        elif place < len(data):
            data[place] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
    return bytes(data)


@pytest.mark.slow
def test_damaged_files_are_refused():
    data = shardinit.export_plan(model).to_bytes()
    content, envelope = shardinit.InitProgram.from_bytes(data).content, pb.InitProgram
    rng = random.Random(0)
    loaded = 0
    for _ in range(FILES):
        file = mutated(data, rng)
        try:
            program = shardinit.InitProgram.from_bytes(file)
        except ProgramFormatError:
            continue
        # Only what a reader of protobuf does not see may load, and it says the same.
        seen = envelope.FromString(file)
        seen.DiscardUnknownFields()
        assert zlib.decompress(seen.content) == program.content == content
        assert seen.sha256 == hashlib.sha256(content).digest()
        loaded += 1
    assert loaded, "no damage was harmless: this test has lost its other half"


def sealed(content):
    """An envelope whose digest is right, as somebody who tampers would make it."""
    return pb.InitProgram(
        format=2,
        sha256=hashlib.sha256(content).digest(),
        content=zlib.compress(content, 1),
        compression=pb.COMPRESSION_ZLIB,
        content_size=len(content),
    ).SerializeToString()


@pytest.mark.slow
def test_tampered_contents_are_refused_or_harmless():
    """The digest is right here; the function is left out, as a module that a compiler
    did not write may do anything once it is parsed."""
    data = shardinit.export_plan(hosted).content
    program = shardinit.InitProgram.from_bytes(sealed(data))
    assert program.content == data
    assert not program.as_cut().programs
    rng = random.Random(1)
    refused = 0
    for _ in range(CONTENTS):
        try:
            program = shardinit.InitProgram.from_bytes(sealed(mutated(data, rng)))
        except ProgramFormatError:
            refused += 1
            continue
        assert len(program.paths) == len(program.as_cut().leaves)
    assert refused > CONTENTS / 2


def test_a_bomb_is_not_unpacked():
    zeros = zlib.compress(bytes(1 << 26), 9)
    for size in (100, 1 << 26, 1 << 29):
        message = pb.InitProgram(
            format=1,
            sha256=bytes(32),
            content=zeros,
            compression=pb.COMPRESSION_ZLIB,
            content_size=size,
        )
        with pytest.raises(ProgramFormatError):
            shardinit.InitProgram.from_bytes(message.SerializeToString())


def test_keys_beyond_all_measure_are_refused():
    content = pb.InitProgramContent.FromString(shardinit.export_plan(model).content)
    content.key_nodes.add().split.shape.append(1 << 30)
    with pytest.raises(ProgramFormatError, match=r"2,147,483,648 words"):
        shardinit.InitProgram.from_bytes(sealed(content.SerializeToString()))
