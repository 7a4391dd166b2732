from __future__ import annotations

from pathlib import Path

from pipeline.data import plots

LENGTHS = {"train": [[5, 3], [9, 1]], "val": [], "calibration": [[7, 1]], "holdout": [[6, 2]]}
PNG = b"\x89PNG"


def test_lengths_are_drawn_and_answers_only_where_they_are_labels(tmp_path: Path) -> None:
    """One picture without labels, two with; the names that come back are the files that are there."""
    assert plots.save({"lengths": LENGTHS, "labels": {}}, tmp_path) == ["token_lengths.png"]
    labels = {"category": {"bug": {"train": 3, "holdout": 1}, "login": {"train": 1}}, "urgent": {"True": {"train": 4}}}
    names = plots.save({"lengths": LENGTHS, "labels": labels}, tmp_path)
    assert names == ["token_lengths.png", "answers.png"]
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(names)
    assert all((tmp_path / name).read_bytes().startswith(PNG) for name in names)


def test_sets_without_rows_are_drawn_without_harm(tmp_path: Path) -> None:
    """An empty set, and a label that train and holdout lack."""
    names = plots.save({"lengths": {"train": [], "val": [[3, 1]]}, "labels": {"answer": {"yes": {"val": 1}}}}, tmp_path)
    assert all((tmp_path / name).read_bytes().startswith(PNG) for name in names)


def test_a_panel_has_the_most_frequent_values_first() -> None:
    """By rows of all sets, then by name, and at most MOST_BARS."""
    rows = {"b": {"train": 2}, "a": {"train": 1, "holdout": 1}, "c": {"train": 9}}
    assert plots._most_frequent(rows) == ["c", "a", "b"]
    many = {f"v{n}": {"train": n} for n in range(plots.MOST_BARS + 5)}
    assert len(plots._most_frequent(many)) == plots.MOST_BARS
