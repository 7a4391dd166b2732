"""The rows of a run in an SQLite file, so that memory doesn't grow with the data.

Disk: about the size of the text plus 200 bytes a row. The file is scratch: every run creates a new one. Its page
cache is 8 MiB, and sorting spills into the same folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sqlite3
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pipeline.data.formats import Body

TRAIN, TEST = 0, 1
LABEL_LENGTH = 400
# Scripts written without spaces: one character stands for a word.
UNSPACED = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]")
SCHEMA = """
CREATE TABLE files (n INTEGER PRIMARY KEY, name TEXT NOT NULL);
CREATE TABLE rows (
    n INTEGER PRIMARY KEY,      -- in the order they were read
    side INTEGER NOT NULL,      -- 0: datasets, 1: test_datasets
    file INTEGER NOT NULL, line INTEGER NOT NULL,
    id TEXT NOT NULL,           -- of the exact content
    prompt BLOB NOT NULL,       -- digest of the folded prompt, or of a folded text
    answer BLOB NOT NULL,       -- digest of the folded answer, empty for a text
    draw INTEGER NOT NULL, draw_val INTEGER NOT NULL, draw_calibration INTEGER NOT NULL,
    tokens INTEGER NOT NULL, answer_tokens INTEGER NOT NULL,
    is_text INTEGER NOT NULL,
    label TEXT,                 -- the answer, where it is short
    body TEXT NOT NULL,         -- messages or text as JSON
    columns TEXT,               -- further columns as a JSON object, where data.columns asks for them
    dropped TEXT,               -- why the row is in no split
    split TEXT                  -- train, val, calibration or holdout
);
"""


@dataclass(frozen=True)
class SoundRow:
    """A row without defects: its place and body, its tokens, the reason if it is dropped, its further columns."""

    side: int
    file: int
    line: int
    body: Body
    tokens: int
    answer_tokens: int
    drop_reason: str | None = None
    columns: Mapping[str, str] | None = None


def create(path: Path) -> sqlite3.Connection:
    """An empty store of rows at `path`; an earlier file there is deleted."""
    path.unlink(missing_ok=True)
    os.environ["SQLITE_TMPDIR"] = str(path.parent)
    db = sqlite3.connect(path, isolation_level=None)
    # The file needn't outlive a crash, so nothing is journaled.
    for pragma in ("journal_mode=OFF", "synchronous=OFF", "temp_store=FILE", "cache_size=-8192"):
        db.execute(f"PRAGMA {pragma}")
    db.executescript(SCHEMA)
    return db


def add_file(db: sqlite3.Connection, name: str) -> int:
    """Note a file's name and return its number."""
    return int(db.execute("INSERT INTO files (name) VALUES (?)", (name,)).lastrowid or 0)


def add(db: sqlite3.Connection, rows: Iterable[SoundRow], seed: int) -> None:
    """Store rows; their places in the draws follow from the folded prompt and the seed alone."""
    db.execute("BEGIN")
    db.executemany(
        "INSERT INTO rows (side, file, line, id, prompt, answer, draw, draw_val, draw_calibration, tokens,"
        " answer_tokens, is_text, label, body, columns, dropped) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (_record(row, seed) for row in rows),
    )
    db.execute("COMMIT")


def _record(row: SoundRow, seed: int) -> tuple[Any, ...]:
    prompt = _digest(prompt_text(row.body))
    label = None if isinstance(row.body, str) else row.body[-1]["content"]
    return (
        row.side, row.file, row.line, content_id(row.body),
        prompt, b"" if label is None else _digest(label), *_draws(prompt, seed), row.tokens,
        row.answer_tokens, label is None, label if label and len(label) <= LABEL_LENGTH else None,
        json.dumps(row.body, ensure_ascii=False),
        json.dumps(row.columns, ensure_ascii=False) if row.columns else None, row.drop_reason,
    )  # fmt: skip


def content_id(body: Body) -> str:
    """16 hex digits that name a row by its exact content."""
    text = json.dumps(body, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def prompt_text(body: Body, *, system: bool = True) -> str:
    """The text that the model reads before the answer, turn after turn; of a text, all of it."""
    if isinstance(body, str):
        return body
    return "\n\n".join(message["content"] for message in body[:-1] if system or message["role"] != "system")


@cache
def _punctuation() -> dict[int, str]:
    """Punctuation, separators and control characters, to become spaces; symbols such as + and € stay."""
    return {point: " " for point in range(0x110000) if unicodedata.category(chr(point))[0] in "PCZ"}


def fold(text: str) -> str:
    """The text without case, punctuation and extra space; a text of punctuation alone stays as it is."""
    plain = " ".join(unicodedata.normalize("NFKC", text).casefold().translate(_punctuation()).split())
    return plain or text.strip()


def words(text: str) -> list[str]:
    """The folded text's words; in scripts written without spaces each character is one."""
    return UNSPACED.sub(r" \g<0> ", fold(text)).split()


def _digest(text: str) -> bytes:
    return hashlib.blake2b(fold(text).encode(), digest_size=16).digest()


def _draws(prompt: bytes, seed: int) -> tuple[int, int, int]:
    """Three independent numbers below 2**63, the same for rows of the same prompt."""
    digest = hashlib.blake2b(prompt, digest_size=24, salt=seed.to_bytes(8, "big", signed=True)).digest()
    first, second, third = (int.from_bytes(digest[n : n + 8], "big") >> 1 for n in (0, 8, 16))
    return first, second, third


def payload(db: sqlite3.Connection, split: str) -> Iterator[dict[str, Any]]:
    """The rows of a split in the payload's form, in an order drawn from their content; the holdout's with their columns."""
    order = "draw_calibration" if split == "calibration" else "draw"
    query = f"SELECT id, is_text, body, columns FROM rows WHERE split = ? ORDER BY {order}, id"  # noqa: S608 - constants
    for identifier, is_text, body, columns in db.execute(query, (split,)):
        row = {"id": identifier, "text" if is_text else "messages": json.loads(body)}
        yield {**row, "columns": json.loads(columns)} if columns and split == "holdout" else row


def count(db: sqlite3.Connection, where: str, *values: Any) -> int:
    """The number of rows that meet a condition."""
    return int(db.execute(f"SELECT count(*) FROM rows WHERE {where}", values).fetchone()[0])  # noqa: S608 - ours


def dropped(db: sqlite3.Connection) -> dict[str, int]:
    """The number of dropped rows by reason."""
    query = "SELECT dropped, count(*) FROM rows WHERE dropped IS NOT NULL GROUP BY dropped ORDER BY dropped"
    return dict(db.execute(query).fetchall())


def places(db: sqlite3.Connection, side: int) -> dict[str, int]:
    """The rows of a side by split, or by the reason for which they were dropped; most first."""
    query = (
        "SELECT coalesce(split, 'dropped as ' || dropped) AS place, count(*) FROM rows"
        " WHERE side = ? GROUP BY place ORDER BY count(*) DESC, place"
    )
    return dict(db.execute(query, (side,)).fetchall())
