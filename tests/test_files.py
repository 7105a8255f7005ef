"""A file is the old one or the new one."""

import os

import pytest

from jaxrlhf import files
from jaxrlhf.errors import StorageError


def test_content_arrives_byte_for_byte_and_nothing_else_is_left(tmp_path):
    for content, expected in (("é\r\n漢\n", "é\r\n漢\n".encode()), (b"\x00\xff", b"\x00\xff"), ("\ud800", b"\\ud800")):
        path = files.write_whole(tmp_path / "new" / "file.txt", content)
        assert path.read_bytes() == expected
        assert [p.name for p in path.parent.iterdir()] == ["file.txt"]


def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path, monkeypatch):
    path = files.write_whole(tmp_path / "file.txt", "old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"file\.txt cannot be written: No space left"):
        files.write_whole(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]


def test_a_block_that_is_left_by_an_exception_leaves_the_old_file_alone(tmp_path):
    path = files.write_whole(tmp_path / "file.txt", "old")
    with pytest.raises(KeyboardInterrupt), files.atomic_open(path) as file:
        file.write(b"new")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(StorageError, match="taken"):
        files.write_whole(tmp_path / "taken" / "file.txt", "x")
