from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.data import rows as data_rows
from pipeline.data import splits
from pipeline.data.rows import TEST, TRAIN, SoundRow


def body(number: int, answer: str = "yes") -> list[dict[str, str]]:
    return [{"role": "user", "content": f"question {number}"}, {"role": "assistant", "content": answer}]


def split(folder: Path, rows: list[SoundRow], seed: int = 1, **sizes) -> dict[str, str]:
    """Each row's split by its id."""
    db = data_rows.create(folder / "rows.sqlite")
    data_rows.add(db, rows, seed)
    splits.assign(db, **{"holdout_size": 0.1, "val_set_size": 0.05, "calibration_set_size": 128, **sizes})
    return dict(db.execute("SELECT id, split FROM rows").fetchall())


def rows(numbers: range, side: int = TRAIN) -> list[SoundRow]:
    return [SoundRow(side, 1, number + 1, body(number), 10, 1) for number in numbers]


def test_a_share_is_about_that_share_and_nobody_moves(tmp_path: Path) -> None:
    """Of 4,000 rows a tenth is held out; with 4,000 more in front, holdout and val keep all they had."""
    before = split(tmp_path, rows(range(4000)))
    after = split(tmp_path, [*rows(range(4000, 8000)), *rows(range(4000))])
    counts = {name: sum(found == name for found in before.values()) for name in ("holdout", "val", "calibration")}
    assert counts["holdout"] == pytest.approx(400, abs=60)
    assert counts["val"] == pytest.approx(180, abs=45)
    assert counts["calibration"] == 128
    assert all(after[name] == found for name, found in before.items() if found in ("holdout", "val"))


def test_another_seed_draws_another_holdout(tmp_path: Path) -> None:
    """The seed decides, so a second split is to be had."""
    first, second = (split(tmp_path, rows(range(500)), seed) for seed in (1, 2))
    assert {name for name in first if first[name] == "holdout"} != {
        name for name in second if second[name] == "holdout"
    }


def test_one_prompt_with_two_answers_is_never_in_two_sets(tmp_path: Path) -> None:
    """Rows of the same prompt, in whatever case, are drawn together, by share and by number."""
    pairs = [
        row
        for n in range(300)
        for row in (SoundRow(TRAIN, 1, n, body(n), 10, 1), SoundRow(TRAIN, 1, n, body(n, "no"), 10, 1))
    ]
    for size in (0.2, 41):
        found = split(tmp_path, pairs, holdout_size=size, val_set_size=size, calibration_set_size=20)
        for number in range(300):
            first, second = (data_rows.content_id(body(number, answer)) for answer in ("yes", "no"))
            assert found[first] == found[second]


def test_one_is_a_row_and_not_all_of_them(tmp_path: Path) -> None:
    """A share is below 1."""
    found = split(tmp_path, rows(range(40)), holdout_size=1, val_set_size=1.0)
    assert [list(found.values()).count(name) for name in ("holdout", "val")] == [1, 1]


def test_test_rows_are_the_holdout_and_nothing_else_is(tmp_path: Path) -> None:
    """With test_datasets no training row is held out, whatever holdout_size says."""
    found = split(tmp_path, [*rows(range(100)), *rows(range(100, 120), TEST)], holdout_size=0.5)
    held = {name for name, where in found.items() if where == "holdout"}
    assert held == {data_rows.content_id(body(number)) for number in range(100, 120)}


def test_calibration_takes_at_most_a_tenth_of_train_but_one_row_at_least(tmp_path: Path) -> None:
    """A small dataset keeps nine of ten rows to be trained on."""
    for total, expected in ((5, 1), (50, 5), (5000, 128)):
        found = split(tmp_path, rows(range(total)), holdout_size=1e-9, val_set_size=0)
        assert sum(where == "calibration" for where in found.values()) == expected


def test_texts_are_calibrated_on_only_where_there_is_nothing_else(tmp_path: Path) -> None:
    """Conversations come first, because they are what will be served."""
    texts = [SoundRow(TRAIN, 1, n, f"text {n}", 10, 0) for n in range(100)]
    kinds = split(tmp_path, [*texts, *rows(range(30))], holdout_size=0.1)
    names = {data_rows.content_id(f"text {n}") for n in range(100)}
    assert not {name for name, where in kinds.items() if where in ("calibration", "holdout")} & names
    alone = split(tmp_path, texts)
    assert sum(where == "calibration" for where in alone.values()) == 9
