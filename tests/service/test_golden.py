import base64
import json

import google_crc32c
import pytest
from google.protobuf import (
    descriptor_pool,
    json_format,
    message_factory,
    unknown_fields,
)

from shardinit.service import streams
from shardinit.v1 import service_pb2
from tests.service import golden

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
    chunk = service_pb2.ShardChunk(
        offset=offset, crc32c=google_crc32c.value(data), data=data
    )
    message = service_pb2.StreamShardsResponse(chunk=chunk)
    assert streams.frame(offset, data) == message.SerializeToString(deterministic=True)
