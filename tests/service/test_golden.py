import base64
import json

import crc32c
import pytest
from google.protobuf import (
    descriptor_pool,
    json_format,
    message_factory,
    unknown_fields,
)
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from shardinit.service.wire import frames
from shardinit.v1 import service_pb2
from tests.service import golden

pytestmark = pytest.mark.once

KEPT = json.loads(golden.FILE.read_text())


def parsed(entry):
    kind = descriptor_pool.Default().FindMessageTypeByName(entry["type"])
    message = message_factory.GetMessageClass(kind)()
    message.ParseFromString(base64.b64decode(entry["bytes"]))
    return message


@pytest.mark.parametrize("name", KEPT)
def test_a_message_of_the_first_release_still_means_the_same(name):
    message = parsed(KEPT[name])
    assert json_format.MessageToDict(message) == KEPT[name]["means"]
    assert len(unknown_fields.UnknownFieldSet(message)) == 0


@pytest.mark.parametrize("name", KEPT)
def test_the_same_message_is_still_written_the_same(name):
    written = golden.messages()[name].SerializeToString(deterministic=True)
    assert base64.b64encode(written).decode() == KEPT[name]["bytes"]


def test_every_message_that_travels_is_kept():
    methods = service_pb2.DESCRIPTOR.services_by_name["InitService"].methods
    needed = {m.input_type.full_name for m in methods}
    needed |= {m.output_type.full_name for m in methods}
    assert needed <= {entry["type"] for entry in KEPT.values()}


@pytest.mark.parametrize("size", [1, 127, 128, 1 << 20])
@pytest.mark.parametrize("offset", [0, 1, 1 << 40])
def test_a_chunk_put_together_by_hand_is_what_protobuf_writes(size, offset):
    data = bytes(size)
    chunk = service_pb2.ShardChunk(offset=offset, crc32c=crc32c.crc32c(data), data=data)
    message = service_pb2.StreamShardsResponse(chunk=chunk)
    written = frames.write(offset, memoryview(data))
    assert written == message.SerializeToString(deterministic=True)
    assert frames.read(written) == (offset, crc32c.crc32c(data), data)


@given(st.data())
def test_a_frame_reads_as_protobuf_reads_it(data):
    """Also one that somebody else wrote, with fields in another order or twice."""
    chunk = frames.write(data.draw(st.integers(0, 300)), memoryview(b"some bytes"))
    place = data.draw(st.integers(0, len(chunk) - 1))
    other = data.draw(st.binary(max_size=4))
    message = chunk[:place] + other + chunk[place + len(other) :]
    try:
        want = service_pb2.StreamShardsResponse.FromString(message)
    except DecodeError:
        with pytest.raises(DecodeError):
            frames.read(message)
        return
    got = frames.read(message)
    if want.WhichOneof("part") != "chunk":
        assert got == want
        return
    fields = (want.chunk.offset, want.chunk.crc32c, want.chunk.data)
    assert (got.offset, got.crc32c, bytes(got.data)) == fields
