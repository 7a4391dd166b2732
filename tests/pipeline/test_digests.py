"""SHA-256 of documents, files and folders."""

from __future__ import annotations

import hashlib
from pathlib import Path

from pipeline.digests import digest_file, digest_files, digest_folder, digest_of


def test_a_document_counts_whatever_the_order_of_its_keys() -> None:
    """The digest of version 0.1 stays: stores and approvals hold it."""
    assert digest_of({"b": 1, "a": [1, 2]}) == digest_of({"a": [1, 2], "b": 1})
    assert digest_of({"b": 1, "a": [1, 2]}) == hashlib.sha256(b'{"a":[1,2],"b":1}').hexdigest()
    assert digest_of([1, 2]) != digest_of([2, 1])


def test_a_file_counts_by_its_bytes(tmp_path: Path) -> None:
    """Its name doesn't matter."""
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"weights")
    assert digest_file(tmp_path / "a") == digest_file(tmp_path / "b") == hashlib.sha256(b"weights").hexdigest()


def test_a_folder_counts_by_names_and_bytes(tmp_path: Path) -> None:
    """Of all files below it; an empty folder is nothing."""
    for place in ("one", "two"):
        (tmp_path / place / "inner").mkdir(parents=True)
        (tmp_path / place / "inner" / "file").write_bytes(b"x")
    assert digest_files(tmp_path / "one") == {"inner/file": hashlib.sha256(b"x").hexdigest()}
    assert digest_folder(tmp_path / "one") == digest_folder(tmp_path / "two")
    (tmp_path / "two" / "empty").mkdir()
    assert digest_folder(tmp_path / "one") == digest_folder(tmp_path / "two")
    (tmp_path / "two" / "inner" / "file").rename(tmp_path / "two" / "inner" / "other")
    assert digest_folder(tmp_path / "one") != digest_folder(tmp_path / "two")
