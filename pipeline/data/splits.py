"""The split of each row: holdout, then val, then calibration, and the rest is train; a row is in one of them.

A row's draw follows from its folded prompt and the seed, so rows with the same prompt stay together. A size is

- a share: a row's split never changes when others are added;
- a number of rows: the lowest draws are taken. Of N added rows about N * size / total push as many others out,
  which move to train.
"""

from __future__ import annotations

import sqlite3

from pipeline.data.rows import TEST, TRAIN, count

SPLITS = ("train", "val", "calibration", "holdout")
WHOLE = 2**63
UNPLACED = "dropped IS NULL AND split IS NULL"
# The quantizer sees at most this part of what would be trained on.
CALIBRATION_SHARE = 10


def assign(db: sqlite3.Connection, *, holdout_size: float, val_set_size: float, calibration_set_size: int) -> None:
    """Give every row that isn't dropped its split; test rows are the holdout, else holdout_size of train is.

    A size below 1 is a share, from 1 on a number of rows. Texts without an answer never go to the holdout; they go
    to calibration only when there are no conversations.
    """
    if count(db, "side = ?", TEST):
        db.execute("UPDATE rows SET split = 'holdout' WHERE dropped IS NULL AND side = ?", (TEST,))
    else:
        _take(db, "holdout", "draw", holdout_size, "is_text = 0")
    _take(db, "val", "draw_val", val_set_size, f"side = {TRAIN}")
    free = count(db, UNPLACED)
    conversations = count(db, f"{UNPLACED} AND is_text = 0")
    size = min(calibration_set_size, max(1, free // CALIBRATION_SHARE))
    _take_rows(db, "calibration", "draw_calibration", size, "is_text = 0" if conversations else "is_text = 1")
    db.execute(f"UPDATE rows SET split = 'train' WHERE {UNPLACED}")  # noqa: S608 - constants


def _take(db: sqlite3.Connection, split: str, draw: str, size: float, where: str) -> None:
    if size >= 1:
        _take_rows(db, split, draw, int(size), where)
    else:
        _take_below(db, split, draw, min(int(size * WHOLE), WHOLE - 1), where)


def _take_rows(db: sqlite3.Connection, split: str, draw: str, rows: int, where: str) -> None:
    """Take the `rows` drawn lowest, and those that share the last one's prompt."""
    query = f"SELECT {draw} FROM rows WHERE {UNPLACED} AND {where} ORDER BY {draw} LIMIT 1 OFFSET ?"  # noqa: S608
    last = db.execute(query, (rows - 1,)).fetchone()
    _take_below(db, split, draw, last[0] + 1 if last else WHOLE - 1, where)


def _take_below(db: sqlite3.Connection, split: str, draw: str, limit: int, where: str) -> None:
    query = f"UPDATE rows SET split = ? WHERE {UNPLACED} AND {where} AND {draw} < ?"  # noqa: S608 - constants
    db.execute(query, (split, limit))
