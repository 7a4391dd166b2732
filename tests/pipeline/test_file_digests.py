from __future__ import annotations

import hashlib
import os
import time

import pytest

from pipeline import file_digests
from pipeline.digests import digest_file


@pytest.fixture
def old_file(tmp_path, monkeypatch):
    monkeypatch.setenv("TUNEGATE_HOME", str(tmp_path / "home"))
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    os.utime(path, ns=(0, time.time_ns() - 10**10))
    return path


def test_a_digest_is_remembered_until_the_file_changes(old_file):
    """The second question reads nothing; other bytes are another digest, also of the same size and time."""
    first = file_digests.remembered(old_file)
    assert first == hashlib.sha256(b"one").hexdigest()
    (memory,) = (old_file.parent / "home").rglob("*.json")
    memory.write_text(memory.read_text().replace(first, "from memory"))
    assert file_digests.remembered(old_file) == "from memory"
    status = old_file.stat()
    old_file.write_bytes(b"two")
    os.utime(old_file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert file_digests.remembered(old_file) == hashlib.sha256(b"two").hexdigest()


def test_a_file_written_just_now_is_not_remembered(old_file, monkeypatch):
    """A second write within the clock's tick could look the same."""
    monkeypatch.setattr(file_digests, "FRESH_NS", 60 * 10**9)
    old_file.write_bytes(b"new")
    file_digests.remembered(old_file)
    assert not list((old_file.parent / "home").rglob("*.json"))


def test_what_serves_is_read_by_the_process_that_asks(old_file, monkeypatch):
    """The store's note of another process isn't believed; the bytes are read once here, and again when they change."""
    asked = []
    monkeypatch.setattr(file_digests, "digest_file", lambda path: asked.append(path) or digest_file(path))
    file_digests.remembered(old_file)
    (memory,) = (old_file.parent / "home").rglob("*.json")
    memory.write_text(memory.read_text().replace(hashlib.sha256(b"one").hexdigest(), "from memory"))
    assert [file_digests.read_here(old_file) for _ in range(3)] == [hashlib.sha256(b"one").hexdigest()] * 3
    assert len(asked) == 2
    status = old_file.stat()
    old_file.write_bytes(b"two")
    os.utime(old_file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert file_digests.read_here(old_file) == hashlib.sha256(b"two").hexdigest()


def test_a_folders_digest_follows_names_and_bytes(old_file):
    """A renamed file is another folder."""
    first = file_digests.remembered_folder(old_file.parent, ["weights"])
    old_file.rename(old_file.with_name("other"))
    assert file_digests.remembered_folder(old_file.parent, ["other"]) != first
