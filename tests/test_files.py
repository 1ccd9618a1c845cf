"""A file is complete under its name, or what was there before still is."""

import os
import stat

import pytest

from shardinit.files import write_file

pytestmark = pytest.mark.once


def test_a_written_file_has_the_mode_that_the_umask_gives(tmp_path):
    previous = os.umask(0o027)
    try:
        write_file(tmp_path / "file", b"content")
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640
    assert (tmp_path / "file").read_bytes() == b"content"


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path, monkeypatch, failing
):
    def fail(*_):
        raise OSError(28, "No space left on device")

    write_file(tmp_path / "file", b"old")
    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="No space"):
        write_file(tmp_path / "file", b"new")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


def test_a_file_that_must_be_new_replaces_nothing(tmp_path):
    write_file(tmp_path / "file", b"old", replace=False)
    with pytest.raises(FileExistsError):
        write_file(tmp_path / "file", b"new", replace=False)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]
    write_file(tmp_path / "file", b"old", replace=False)  # the same once more
