import os
import threading
from contextlib import contextmanager
from functools import partial

import pytest

from shardinit.errors import ServiceError
from shardinit.service.client.store import Store, digest_of
from shardinit.service.server.cache import BuildCache
from shardinit.v1 import program_pb2

pytestmark = pytest.mark.once


def test_the_least_recently_used_goes_first():
    cache = BuildCache(10, len)
    for key, value in {"a": b"aaaa", "b": b"bbbb", "c": b"cc"}.items():
        cache.get(key, partial(bytes, value))
    assert cache.bytes == 10
    assert cache.find(b"aaaa".__eq__) == b"aaaa"
    cache.get("d", lambda: b"dddd")
    made = [b"aaaa", b"bbbb", b"cc", b"dddd"]
    assert [v for v in made if cache.find(v.__eq__)] == [b"aaaa", b"cc", b"dddd"]
    assert cache.bytes == 10


def test_a_value_larger_than_the_cache_is_given_and_not_kept():
    cache = BuildCache(3, len)
    assert cache.get("a", lambda: b"1234") == b"1234"
    assert cache.find(lambda value: True) is None
    assert cache.bytes == 0


def test_a_failed_build_is_told_to_all_and_tried_again_later():
    cache = BuildCache(10, len)
    inside, release = threading.Event(), threading.Event()
    errors = []

    def fail():
        inside.set()
        release.wait(10)
        raise ValueError("once")

    def ask(build):
        try:
            cache.get("a", build)
        except ValueError as error:
            errors.append(str(error))

    first = threading.Thread(target=ask, args=(fail,))
    first.start()
    assert inside.wait(10)
    with pytest.raises(ServiceError) as caught:
        cache.get("a", lambda: b"", timeout=0.01)
    assert caught.value.code == "DEADLINE_EXCEEDED"
    second = threading.Thread(target=ask, args=(fail,))
    second.start()
    release.set()
    first.join()
    second.join()
    assert errors == ["once", "once"]
    assert cache.get("a", lambda: b"fine") == b"fine"


@contextmanager
def building(cache):
    """A build of "a" that runs as long as the block."""
    inside, release = threading.Event(), threading.Event()

    def slow():
        inside.set()
        release.wait(10)
        return b"a"

    thread = threading.Thread(target=cache.get, args=("a", slow))
    thread.start()
    assert inside.wait(10)
    yield
    release.set()
    thread.join()


def test_builds_beyond_the_allowed_number_wait():
    cache = BuildCache(10, len, builds=1)
    with building(cache), pytest.raises(ServiceError, match="still being built"):
        cache.get("b", lambda: b"b", timeout=0.01)
    assert cache.get("b", lambda: b"b", timeout=0.01) == b"b"


def test_a_caller_whose_time_is_up_leaves_those_behind_it_undisturbed():
    cache = BuildCache(10, len, builds=1)
    late, got = [], []

    def hurried():
        with pytest.raises(ServiceError) as caught:
            cache.get("b", lambda: b"b", timeout=0.3)
        late.append(caught.value.code)

    def patient():
        got.append(cache.get("b", lambda: b"b", timeout=20))

    threads = [threading.Thread(target=hurried), threading.Thread(target=patient)]
    with building(cache):
        threads[0].start()
        threads[0].join(0.1)
        threads[1].start()
        threads[0].join()
    threads[1].join()
    assert late == ["DEADLINE_EXCEEDED"]
    assert got == [b"b"]


def program(content):
    import hashlib

    return program_pb2.InitProgram(
        format=1, sha256=hashlib.sha256(content).digest(), content=content
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
