"""Files written whole or not at all, and lines that outlive a kill."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from pipeline.files import HALF_WRITTEN, finished_lines, link, write_json, write_lines


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    """A document that can't be written leaves the old one."""
    file = tmp_path / "state.json"
    write_json(file, {"b": 1, "a": 2})
    assert file.read_text(encoding="utf-8") == '{\n "a": 2,\n "b": 1\n}\n'
    with pytest.raises(TypeError):
        write_json(file, {"a": object()})
    assert json.loads(file.read_text(encoding="utf-8")) == {"b": 1, "a": 2}
    assert list(tmp_path.iterdir()) == [file]


def test_a_killed_writer_leaves_a_file_that_is_known_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed before the rename: the next run deletes what matches, and no file of a payload does."""
    monkeypatch.setattr(Path, "replace", lambda *_: None)
    write_json(tmp_path / "report.json", {})
    (half,) = tmp_path.iterdir()
    assert half.name == f".report.json.{os.getpid()}"
    assert HALF_WRITTEN.fullmatch(half.name)
    for name in ("report.json", "model-00001-of-00002.safetensors", ".gitattributes"):
        assert not HALF_WRITTEN.fullmatch(name)


def test_a_half_written_line_is_cut_off(tmp_path: Path) -> None:
    """More lines are appended behind the last whole one."""
    file = tmp_path / "items.jsonl"
    assert finished_lines(file) == []
    write_lines(file, [{"id": "ä"}, {"id": 2}])
    whole = file.read_bytes()
    assert "ä".encode() in whole
    file.write_bytes(whole + b'{"id": 3')
    assert [json.loads(line) for line in finished_lines(file)] == [{"id": "ä"}, {"id": 2}]
    assert file.read_bytes() == whole
    file.write_bytes(b'{"id": 1')
    assert finished_lines(file) == []
    assert file.read_bytes() == b""


def test_lines_are_written_below_a_new_folder(tmp_path: Path) -> None:
    """One document a line."""
    write_lines(tmp_path / "new" / "rows.jsonl", [1, "two"])
    assert (tmp_path / "new" / "rows.jsonl").read_text(encoding="utf-8") == '1\n"two"\n'


def test_a_link_is_changed_in_one_step(tmp_path: Path) -> None:
    """Also where a killed run left its half-made one."""
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
    (tmp_path / f".model.{os.getpid()}").symlink_to(tmp_path / "old")
    for name in ("old", "new"):
        link(tmp_path / "model", tmp_path / name)
        assert (tmp_path / "model").resolve() == tmp_path / name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "new", "old"]
