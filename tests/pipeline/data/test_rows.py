from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.data import rows as data_rows
from pipeline.data.rows import TEST, TRAIN, SoundRow


def body(question: str, answer: str = "yes") -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def row(question: str, side: int = TRAIN, **more) -> SoundRow:
    return SoundRow(side, 1, 1, body(question), 10, 1, **more)


@pytest.mark.parametrize(
    ("first", "second", "equal"),
    [
        ("Where is my card?", "where  is MY card", True),
        ("I can't pay!", "I can\u2019t pay", True),
        ("\uff46\uff55\uff4c\uff4c width", "full width", True),
        ("What is 3+4?", "What is 3=4?", False),
        ("???", "!!!", False),
        ("straße", "STRASSE", True),
    ],
)
def test_folding_forgets_case_punctuation_and_space(first: str, second: str, equal: bool) -> None:
    """Symbols that carry meaning stay, and a text of punctuation alone is not empty."""
    assert (data_rows.fold(first) == data_rows.fold(second)) is equal


def test_words_are_separated_in_scripts_without_spaces() -> None:
    """Folded words; a Chinese character stands for one."""
    assert data_rows.words("Where is: MY card?") == ["where", "is", "my", "card"]
    assert data_rows.words("iPhone 卡在") == ["iphone", "卡", "在"]


def test_a_prompt_is_all_turns_but_the_answer() -> None:
    """The system message can be left out; a text is its own prompt."""
    turns = [{"role": "system", "content": "Be brief."}, *body("Where?")]
    assert data_rows.prompt_text(turns) == "Be brief.\n\nWhere?"
    assert data_rows.prompt_text(turns, system=False) == "Where?"
    assert data_rows.prompt_text("a text") == "a text"


def test_an_id_names_the_exact_content() -> None:
    """Equal content has one id whatever the order of keys; case alone gives another."""
    turns = body("Where?")
    assert data_rows.content_id(turns) == data_rows.content_id([dict(reversed(turn.items())) for turn in turns])
    assert data_rows.content_id(turns) != data_rows.content_id(body("where?"))
    assert len(data_rows.content_id(turns)) == 16


def test_rows_of_one_folded_prompt_have_the_same_draws(tmp_path: Path) -> None:
    """Draws follow from the folded prompt and the seed, not from the answer or the place."""
    db = data_rows.create(tmp_path / "rows.sqlite")
    data_rows.add(
        db, [row("Where is it?"), SoundRow(TEST, 2, 9, body("where is IT", "no"), 3, 1), row("When?")], seed=1
    )
    draws = db.execute("SELECT draw, draw_val, draw_calibration FROM rows ORDER BY n").fetchall()
    assert draws[0] == draws[1] != draws[2]
    assert len(set(draws[0])) == 3
    data_rows.add(db, [row("Where is it?")], seed=2)
    assert db.execute("SELECT draw FROM rows ORDER BY n DESC LIMIT 1").fetchone()[0] != draws[0][0]


def test_the_payload_has_the_columns_of_the_holdout_alone(tmp_path: Path) -> None:
    """A row is its id and messages or text; further columns stay with holdout rows."""
    db = data_rows.create(tmp_path / "rows.sqlite")
    rows = [
        row("a", columns={"channel": "mail"}),
        row("b", columns={"channel": "chat"}),
        SoundRow(TRAIN, 1, 3, "t", 5, 0),
    ]
    data_rows.add(db, rows, seed=1)
    db.execute("UPDATE rows SET split = CASE n WHEN 1 THEN 'holdout' ELSE 'train' END")
    (held_out,) = data_rows.payload(db, "holdout")
    assert held_out == {"id": data_rows.content_id(body("a")), "messages": body("a"), "columns": {"channel": "mail"}}
    assert {frozenset(entry) for entry in data_rows.payload(db, "train")} == {
        frozenset({"id", "messages"}),
        frozenset({"id", "text"}),
    }


def test_dropped_rows_are_counted_by_reason_and_side(tmp_path: Path) -> None:
    """`dropped` counts reasons, `places` says where the rows of a side went, most first."""
    db = data_rows.create(tmp_path / "rows.sqlite")
    rows = [row("a"), row("b"), row("c", drop_reason="too_long"), row("d", TEST, drop_reason="duplicate")]
    data_rows.add(db, rows, seed=1)
    db.execute("UPDATE rows SET split = 'val' WHERE dropped IS NULL")
    assert data_rows.dropped(db) == {"duplicate": 1, "too_long": 1}
    assert list(data_rows.places(db, TRAIN).items()) == [("val", 2), ("dropped as too_long", 1)]
    assert data_rows.count(db, "side = ?", TEST) == 1


def test_a_store_is_empty_and_replaces_an_earlier_one(tmp_path: Path) -> None:
    """Every run starts without rows, also where a killed run left a file."""
    (tmp_path / "rows.sqlite").write_bytes(b"left by a killed run")
    db = data_rows.create(tmp_path / "rows.sqlite")
    assert data_rows.count(db, "1") == 0
    assert [data_rows.add_file(db, name) for name in ("a.jsonl", "b.jsonl")] == [1, 2]
