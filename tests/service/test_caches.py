import asyncio
import hashlib
import os
import zlib

import pytest

from shardinit.errors import ServiceError
from shardinit.service.client.disk import Store, digest_of
from shardinit.service.server import store
from shardinit.service.server.cache import BuildCache, Kept
from shardinit.service.server.objects import EVERYBODY, Objects
from shardinit.service.server.store import Store as ProgramStore
from shardinit.v1 import program_pb2, service_pb2

pytestmark = pytest.mark.once


def test_the_least_recently_used_goes_first():
    gone = []
    kept = Kept(10, len, lambda: gone.append(1))
    for key, value in {"a": b"aaaa", "b": b"bbbb", "c": b"cc"}.items():
        kept.put(key, value)
    assert kept.bytes == 10
    assert kept.get("a") == b"aaaa"
    kept.put("d", b"dddd")
    assert [key for key in "abcd" if kept.get(key)] == ["a", "c", "d"]
    assert kept.bytes == 10
    assert len(gone) == 1


def test_a_value_larger_than_the_cache_is_given_and_not_kept():
    async def main():
        cache = BuildCache(3, len)

        async def build():
            return b"1234"

        assert await cache.get("a", build) == b"1234"
        assert cache.bytes == 0

    asyncio.run(main())


class Build:
    """A build that a test holds back, and counts."""

    def __init__(self, value):
        self.value = value
        self.go_on = asyncio.Event()
        self.begun = self.cancelled = 0

    async def __call__(self):
        self.begun += 1
        try:
            await self.go_on.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if isinstance(self.value, Exception):
            raise self.value
        return self.value


def test_a_failed_build_is_told_to_all_and_tried_again_later():
    async def main():
        cache, build = BuildCache(10, len), Build(ValueError("once"))
        asked = [asyncio.create_task(cache.get("a", build)) for _ in range(3)]
        await asyncio.sleep(0)
        build.go_on.set()
        told = await asyncio.gather(*asked, return_exceptions=True)
        assert [str(error) for error in told] == ["once"] * 3
        assert build.begun == 1
        build.value = b"fine"
        assert await cache.get("a", build) == b"fine"

    asyncio.run(main())


def test_a_build_ends_with_the_last_who_waits_and_not_before():
    async def main():
        cache, build = BuildCache(10, len), Build(b"a")
        asked = [asyncio.create_task(cache.get("a", build)) for _ in range(3)]
        await asyncio.sleep(0.01)
        for task in asked[:2]:
            task.cancel()
        await asyncio.sleep(0.01)
        assert build.cancelled == 0
        asked[2].cancel()
        await asyncio.sleep(0.01)
        assert (build.begun, build.cancelled) == (1, 1)
        again = asyncio.create_task(cache.get("a", build))
        build.go_on.set()
        assert await again == b"a"
        assert await cache.get("a", build) == b"a"
        assert build.begun == 2

    asyncio.run(main())


def test_who_comes_while_a_build_is_ended_begins_anew():
    async def main():
        cache, build = BuildCache(10, len), Build(b"a")
        first = asyncio.create_task(cache.get("a", build))
        await asyncio.sleep(0.01)
        first.cancel()
        second = asyncio.create_task(cache.get("a", build))
        await asyncio.sleep(0.01)
        build.go_on.set()
        assert await second == b"a"

    asyncio.run(main())


def header_of(data):
    sha256 = hashlib.sha256(data).digest()
    return service_pb2.ProgramHeader(size=len(data), sha256=sha256)


def test_a_store_of_programs_is_bounded_and_found_again(tmp_path):
    gone = []
    store = ProgramStore(tmp_path, 10, evicted=lambda: gone.append(1))
    programs = [b"aaaa", b"bbbb", b"cccc"]
    for data in programs:
        store.put(header_of(data), data, "ours")
    headers = [store.header(header_of(data).sha256) for data in programs]
    assert headers == [None, *map(header_of, programs[1:])]
    assert len(gone) == 1
    again = ProgramStore(tmp_path, 10)
    assert again.bytes == store.bytes == 8
    assert again.read(header_of(b"cccc").sha256) == (header_of(b"cccc"), b"cccc")
    with pytest.raises(ServiceError, match="is held here") as caught:
        again.read(bytes(32))
    assert caught.value.code == "NOT_FOUND"


@pytest.mark.parametrize("shared", ["folder", "objects"])
def test_a_program_of_others_is_as_one_that_is_not_there(tmp_path, shared):
    objects = Objects(f"memory://owners-{shared}") if shared == "objects" else None
    folders = [tmp_path / name for name in ("a", "b" if objects else "a")]
    one, other = (ProgramStore(folder, 100, objects) for folder in folders)
    header, built = header_of(b"uploaded"), header_of(b"built")

    async def found(header, owner):
        owners = owner, EVERYBODY
        return [await x.find(header.sha256, owners) for x in (one, other)]

    async def ask():
        await one.share(header, b"uploaded", "first")
        await one.share(built, b"built", EVERYBODY)
        assert await found(header, "first") == [header, header]
        for stranger in ("second", "", "firs", "*"):
            assert await found(header, stranger) == [None, None]
            assert await found(built, stranger) == [built, built]
        await other.share(header, b"uploaded", "second")
        for owner in ("first", "second"):
            assert await found(header, owner) == [header, header]

    asyncio.run(ask())


def test_a_program_goes_with_its_owners_and_one_without_is_nobody_s(tmp_path):
    store, header = ProgramStore(tmp_path, 10), header_of(b"aaaaaa")
    store.put(header, b"aaaaaa", "first")
    store.put(header_of(b"bbbbbb"), b"bbbbbb", "first")
    assert not list(tmp_path.glob(f"{header.sha256.hex()}*"))
    for mark in tmp_path.glob("*.owner"):  # as an older version left it
        mark.unlink()
    found = store.find(header_of(b"bbbbbb").sha256, ["first", "", EVERYBODY])
    assert asyncio.run(found) is None


def test_an_object_store_gives_back_what_it_was_given_or_says_that_it_fails():
    objects = Objects("memory://programs")
    header = service_pb2.ProgramHeader(size=3, sha256=bytes(32), fingerprint="ab")

    async def there_and_back():
        assert await objects.get(header.sha256, ["theirs", "ours"]) is None
        await objects.put(header, b"abc", "ours")
        return await objects.get(header.sha256, ["theirs", "ours"])

    assert asyncio.run(there_and_back()) == (header, b"abc", "ours")
    with pytest.raises(ServiceError, match="no-such"):
        Objects("no-such://programs")


def test_an_object_store_that_fails_ends_uploads_and_not_builds(tmp_path, monkeypatch):
    objects = Objects("memory://programs")
    header = service_pb2.ProgramHeader(size=3, sha256=bytes(32))
    store = ProgramStore(tmp_path, 1 << 20, objects)

    def fail(*_):
        raise ConnectionError("nobody there")

    monkeypatch.setattr(objects._files, "pipe_file", fail)
    asyncio.run(store.share(header, b"abc", EVERYBODY))
    assert store.read(header.sha256) == (header, b"abc")
    with pytest.raises(ServiceError, match="nobody there") as caught:
        asyncio.run(store.share(header, b"abc", "ours"))
    assert caught.value.code == "UNAVAILABLE"


def test_a_store_of_programs_without_a_folder_leaves_nothing():
    store = ProgramStore(None, 10)
    store.put(header_of(b"a"), b"a", "ours")
    assert store.folder.is_dir()
    store.close()
    assert not store.folder.exists()


def test_a_store_that_takes_no_more_says_which_limit_that_is(tmp_path, monkeypatch):
    def write_file(*_):
        raise OSError(28, "No space left on device")

    kept = ProgramStore(tmp_path, 100)
    monkeypatch.setattr(store, "write_file", write_file)
    with pytest.raises(ServiceError, match="No space left") as caught:
        kept.put(header_of(b"data"), b"data", "ours")
    assert (caught.value.code, caught.value.limit) == ("RESOURCE_EXHAUSTED", "store")


def test_a_store_where_nothing_can_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ServiceError, match="store"):
        ProgramStore(tmp_path / "file" / "store", 10)


def program(content):
    return program_pb2.InitProgram(
        format=1,
        sha256=hashlib.sha256(content).digest(),
        content=zlib.compress(content),
        compression=program_pb2.COMPRESSION_ZLIB,
        content_size=len(content),
    ).SerializeToString()


def test_a_store_gives_back_what_it_was_given(tmp_path):
    store, data = Store(tmp_path), program(b"x")
    store.write(digest_of(data), data)
    assert Store(tmp_path).read(digest_of(data)) == data
    assert store.read("0" * 64) is None
    store.remember("spec", "a" * 64)
    assert store.remembered("spec") == "a" * 64
    assert store.remembered("other") is None
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".program", ".spec"]


def test_a_store_keeps_a_bounded_number(tmp_path):
    store = Store(tmp_path, keep=3)
    digests = []
    for i in range(5):
        data = program(b"%d" % i)
        digests.append(digest_of(data))
        store.write(digests[-1], data)
        os.utime(tmp_path / f"{digests[-1]}.program", (i, i))
    assert [d for d in digests if store.read(d)] == digests[2:]


@pytest.mark.parametrize("data", [b"", b"\xff", program(b"x")[:-1]])
def test_bytes_that_are_no_program_have_no_digest(data):
    assert digest_of(data) is None


def test_a_store_that_cannot_write_by_default_costs_only_a_download(
    tmp_path, monkeypatch
):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    store, data = Store(), program(b"x")
    store.write(digest_of(data), data)
    assert store.read(digest_of(data)) is None
