"""Rows that say the same: equal rows are dropped, near rows found by MinHash and locality-sensitive hashing.

Equal: the same after folding case, punctuation and space. Near: the word 3-grams of two prompts, and those of their
system messages, have a Jaccard similarity of at least the threshold.

The signatures come from datasketch. Their bands lie in the run's SQLite file: memory stays the same for any number of
rows, disk grows by about 40 bytes a band and row. A pair at the threshold is found with a probability of 99 %, a more
similar pair with a higher one. Every candidate pair is checked by its exact similarity. In a bucket of many rows,
a holdout row is compared with the first CANDIDATES training rows, a training row with the first one.

Not found here: a holdout question inside a longer text or an earlier turn (`data/leaks.py` looks for those),
translations, paraphrases.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from pipeline.data.formats import Body
from pipeline.data.rows import TEST, TRAIN, count, prompt_text, words

PERMUTATIONS = 128
CANDIDATES = 8
WORDS = 3
SLICE = 4096
BATCH = 512
KEPT = "dropped IS NULL"

Report = Callable[[int, int], None]


@dataclass(frozen=True)
class Place:
    """A row by file and line, with its split and the beginning of its prompt."""

    file: str
    line: int
    split: str
    text: str


@dataclass(frozen=True)
class Pair:
    """Two rows with similar prompts; `leak` when the first is in the holdout and the second is not."""

    similarity: float
    leak: bool
    first: Place
    second: Place


def drop_equal(db: sqlite3.Connection) -> None:
    """Drop repeated rows of each side, and rows of `datasets` whose prompt is one of `test_datasets`.

    Call before the splits are drawn.
    """
    db.execute("CREATE INDEX rows_equal ON rows (prompt, answer, side, n)")
    db.execute(
        "UPDATE rows SET dropped = 'duplicate' WHERE dropped IS NULL AND EXISTS"
        " (SELECT 1 FROM rows AS other WHERE other.prompt = rows.prompt AND other.answer = rows.answer"
        " AND other.side = rows.side AND other.n < rows.n)"
    )
    db.execute(
        "UPDATE rows SET dropped = 'in_holdout' WHERE side = ? AND dropped IS NULL AND EXISTS"
        " (SELECT 1 FROM rows AS other WHERE other.prompt = rows.prompt AND other.side = ?)",
        (TRAIN, TEST),
    )


def conflicts(db: sqlite3.Connection, limit: int) -> tuple[int, list[list[Place]]]:
    """How many prompts have more than one answer within a side, and the rows of the first `limit` of them."""
    groups = f"FROM rows WHERE {KEPT} AND is_text = 0 GROUP BY side, prompt HAVING count(DISTINCT answer) > 1"
    total = db.execute(f"SELECT count(*) FROM (SELECT 1 {groups})").fetchone()[0]  # noqa: S608 - constants
    first = db.execute(f"SELECT side, prompt {groups} ORDER BY min(n) LIMIT ?", (limit,)).fetchall()
    rows = f"SELECT n FROM rows WHERE side = ? AND prompt = ? AND {KEPT} ORDER BY n LIMIT 5"  # noqa: S608
    return total, [[place(db, n) for (n,) in db.execute(rows, group).fetchall()] for group in first]


def bands_for(threshold: float) -> tuple[int, int]:
    """Bands and rows a band: the most selective that find a pair at the threshold in 99 of 100 cases."""
    for rows in range(PERMUTATIONS, 0, -1):
        bands = PERMUTATIONS // rows
        if 1 - (1 - threshold**rows) ** bands >= 0.99:
            return bands, rows
    return PERMUTATIONS, 1


def shingles(text: str) -> frozenset[str]:
    """The folded text's word 3-grams; a shorter text is one shingle."""
    text_words = words(text)
    if not text_words:
        return frozenset()
    size = min(WORDS, len(text_words))
    return frozenset(" ".join(text_words[n : n + size]) for n in range(len(text_words) - size + 1))


def jaccard(first: frozenset[str], second: frozenset[str]) -> float:
    """The size of the intersection by that of the union, 0 to 1; two empty sets are equal."""
    return len(first & second) / len(first | second) if first or second else 1.0


def similarity(first: Body, second: Body) -> float:
    """The similarity of two rows' turns, or that of their system messages where it is lower."""
    turns, systems = (
        jaccard(shingles(of(first)), shingles(of(second))) for of in (lambda b: prompt_text(b, system=False), _system)
    )
    return min(turns, systems)


def find_near(db: sqlite3.Connection, threshold: float, report: Report) -> Iterator[Pair]:
    """Each row's most similar row: of a holdout row among the rest (a leak), of any other row among earlier ones.

    Call after the splits are drawn. `report` is called with the number of rows hashed so far, and of all rows.
    """
    _fill_bands(db, threshold, report)
    db.execute("CREATE INDEX bands_key ON bands (key, holdout, n)")
    db.execute("CREATE TABLE pairs (a INTEGER, b INTEGER, leak INTEGER, PRIMARY KEY (a, b)) WITHOUT ROWID")
    db.execute("BEGIN")
    db.executemany("INSERT OR IGNORE INTO pairs VALUES (?, ?, ?)", _candidates(db))
    db.execute("COMMIT")
    by_row = itertools.groupby(db.execute("SELECT a, b, leak FROM pairs ORDER BY a, b"), key=lambda pair: pair[0])
    for row, pairs in by_row:
        best, partner, leak = _most_similar(db, row, pairs)
        if best >= threshold:
            yield Pair(round(best, 4), leak, place(db, row), place(db, partner))


def _most_similar(db: sqlite3.Connection, row: int, pairs: Iterable[tuple[int, int, int]]) -> tuple[float, int, bool]:
    """The highest similarity among a row's pairs, the row that has it (of several the first), and whether it leaks."""
    body = body_of(db, row)
    best, partner, best_leaks = -1.0, 0, False
    for _, candidate, leak in pairs:  # in order of rows, so that the first of equals stays
        candidate_similarity = similarity(body, body_of(db, candidate))
        if candidate_similarity > best:
            best, partner, best_leaks = candidate_similarity, candidate, bool(leak)
    return best, partner, best_leaks


def _fill_bands(db: sqlite3.Connection, threshold: float, report: Report) -> None:
    from datasketch import MinHash

    bands, rows = bands_for(threshold)
    empty = MinHash(num_perm=PERMUTATIONS, seed=1)
    total = count(db, KEPT)
    db.execute("CREATE TABLE bands (key INTEGER NOT NULL, holdout INTEGER NOT NULL, n INTEGER NOT NULL)")
    cursor = db.execute(f"SELECT n, split = 'holdout', body FROM rows WHERE {KEPT} ORDER BY n")  # noqa: S608
    for rows_so_far in itertools.count(step=BATCH):
        batch = cursor.fetchmany(BATCH)
        report(min(rows_so_far, total), total)
        if not batch:
            return
        db.execute("BEGIN")
        for n, holdout, body in batch:
            signature = _signature(empty, prompt_text(json.loads(body), system=False))
            keys = (_key(band, signature[band * rows : (band + 1) * rows]) for band in range(bands))
            db.executemany("INSERT INTO bands VALUES (?, ?, ?)", ((key, holdout, n) for key in keys))
        db.execute("COMMIT")


def _signature(empty: Any, text: str) -> Any:
    minhash = empty.copy()
    text_bytes = [shingle.encode() for shingle in shingles(text)]
    for start in range(0, len(text_bytes), SLICE):  # the hashes of a slice are a matrix of SLICE x PERMUTATIONS
        minhash.update_batch(text_bytes[start : start + SLICE])
    return minhash.hashvalues


def _key(band: int, values: Any) -> int:
    digest = hashlib.blake2b(values.tobytes(), digest_size=8, salt=band.to_bytes(2, "big")).digest()
    return int.from_bytes(digest, "big", signed=True)


def _candidates(db: sqlite3.Connection) -> Iterator[tuple[int, int, bool]]:
    """Pairs that share a bucket, training rows of a bucket first."""
    entries = db.execute("SELECT key, holdout, n FROM bands ORDER BY key, holdout, n")
    for _, bucket in itertools.groupby(entries, key=lambda row: row[0]):
        train: list[int] = []
        for _, holdout, n in bucket:
            yield from ((n, partner, bool(holdout)) for partner in (train if holdout else train[:1]))
            if not holdout and len(train) < CANDIDATES:
                train.append(n)


def body_of(db: sqlite3.Connection, n: int) -> Body:
    """The messages or the text of a row."""
    body: Body = json.loads(db.execute("SELECT body FROM rows WHERE n = ?", (n,)).fetchone()[0])
    return body


def place(db: sqlite3.Connection, n: int) -> Place:
    """Where a row stands."""
    query = "SELECT files.name, line, split, body FROM rows JOIN files ON files.n = rows.file WHERE rows.n = ?"
    name, line, split, body = db.execute(query, (n,)).fetchone()
    return Place(name, line, split, prompt_text(json.loads(body), system=False)[:300])


def _system(body: Body) -> str:
    return "" if isinstance(body, str) else "\n".join(m["content"] for m in body if m["role"] == "system")
