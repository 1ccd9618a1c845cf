"""An upload that is refused for a while is sent again, as long as its caller waits."""

import numpy as np
import pytest

import shardinit
from shardinit.errors import ServiceError
from shardinit.service.server.config import Config
from shardinit.service.server.front import Front
from shardinit.service.server.server import Server

pytestmark = pytest.mark.once


def refusing(*errors):
    """A front that refuses as many uploads, having read some, and then takes them."""
    left = list(errors)

    class Refusing(Front):
        async def UploadProgram(self, messages, call):
            if not left:
                return await super().UploadProgram(messages, call)
            await anext(messages)
            await anext(messages)
            raise left.pop(0)

    return Refusing, left


GONE = ServiceError("", "the replica ends", code="UNAVAILABLE")
BUSY = ServiceError(
    "", "full", code="RESOURCE_EXHAUSTED", limit="upload-bytes", retry_after=0.05
)
FULL = ServiceError("", "full", code="RESOURCE_EXHAUSTED", limit="cache-bytes")


@pytest.fixture(scope="module")
def large():
    """A program of more bytes than gRPC keeps to send them again by itself."""
    words = np.arange(1 << 18, dtype=np.uint32) * 2654435761
    return shardinit.export_plan(shardinit.plan(lambda key: {"w": words}))


@pytest.mark.parametrize("errors", [(GONE,), (BUSY,), (GONE, BUSY, BUSY, GONE)])
def test_an_upload_that_a_busy_or_ending_server_refuses_is_sent_again(
    large, tmp_path, errors
):
    front, left = refusing(*errors)
    with (
        Server(Config(allow_upload=True), front=front) as server,
        shardinit.connect(server.address, timeout=60, cache_dir=tmp_path) as client,
    ):
        assert client.upload(large) == large.sha256
        assert client.describe(large.sha256).total_bytes == 1 << 20
    assert not left


def test_an_upload_is_sent_again_for_as_long_as_its_caller_waits_and_no_longer(
    large, tmp_path
):
    front, left = refusing(FULL, *[BUSY] * 1000)
    with (
        Server(Config(allow_upload=True), front=front) as server,
        shardinit.connect(server.address, timeout=2, cache_dir=tmp_path) as client,
    ):
        with pytest.raises(ServiceError) as caught:
            client.upload(large)
        assert (caught.value.limit, len(left)) == ("cache-bytes", 1000)
        with pytest.raises(ServiceError) as caught:
            client.upload(large)
    assert caught.value.limit == "upload-bytes"
    assert 900 < len(left) < 999
