"""Rows that say the same: equal ones are dropped, near ones found by MinHash and locality-sensitive hashing.

Equal means equal after folding case, punctuation and space. Near means that the word 3-grams of two prompts
(and those of their system messages) have a Jaccard similarity of at least the threshold. The signatures
come from datasketch; their bands lie in the run's SQLite file, so memory stays the same for any number of
rows, and disk grows by about 40 bytes a band and row. A pair at the threshold is found with a probability
of 99 %, a more similar one more surely; what is found is checked by its exact similarity. In a bucket that
many rows share, a holdout row is compared with the first CANDIDATES training rows of it, a training row
with the first one.

Not found here: a holdout question inside a longer text or an earlier turn (`data/leaks.py` looks for those),
translations, paraphrases.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sqlite3
from collections.abc import Callable, Iterator
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
    """A row by file and line, with the set that it is in and the beginning of its prompt."""

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
    found = words(text)
    size = min(WORDS, len(found))
    return frozenset(" ".join(found[n : n + size]) for n in range(len(found) - size + 1)) if found else frozenset()


def jaccard(first: frozenset[str], second: frozenset[str]) -> float:
    """Shared part of two sets, 0 to 1; two empty sets are equal."""
    return len(first & second) / len(first | second) if first or second else 1.0


def similarity(first: Body, second: Body) -> float:
    """How similar two rows' prompts are: their turns or, where that is less, their system messages."""
    turns, systems = (
        jaccard(shingles(of(first)), shingles(of(second))) for of in (lambda b: prompt_text(b, system=False), _system)
    )
    return min(turns, systems)


def find_near(db: sqlite3.Connection, threshold: float, report: Report) -> Iterator[Pair]:
    """Each row's most similar other row: a holdout row's among the rest (a leak), others' among earlier ones.

    Call after the splits are drawn. `report` is told how many rows of how many have been hashed.
    """
    _fill_bands(db, threshold, report)
    db.execute("CREATE INDEX bands_key ON bands (key, holdout, n)")
    db.execute("CREATE TABLE pairs (a INTEGER, b INTEGER, leak INTEGER, PRIMARY KEY (a, b)) WITHOUT ROWID")
    db.execute("BEGIN")
    db.executemany("INSERT OR IGNORE INTO pairs VALUES (?, ?, ?)", _candidates(db))
    db.execute("COMMIT")
    by_row = itertools.groupby(db.execute("SELECT a, b, leak FROM pairs ORDER BY a, b"), key=lambda pair: pair[0])
    for a, group in by_row:
        mine = body_of(db, a)
        best, b, leak = max(((similarity(mine, body_of(db, b)), -b, leak) for _, b, leak in group))
        if best >= threshold:
            yield Pair(round(best, 4), bool(leak), place(db, a), place(db, -b))


def _fill_bands(db: sqlite3.Connection, threshold: float, report: Report) -> None:
    from datasketch import MinHash

    bands, rows = bands_for(threshold)
    empty = MinHash(num_perm=PERMUTATIONS, seed=1)
    total = count(db, KEPT)
    db.execute("CREATE TABLE bands (key INTEGER NOT NULL, holdout INTEGER NOT NULL, n INTEGER NOT NULL)")
    reading = db.execute(f"SELECT n, split = 'holdout', body FROM rows WHERE {KEPT} ORDER BY n")  # noqa: S608
    for done in itertools.count(step=BATCH):
        some = reading.fetchmany(BATCH)
        report(min(done, total), total)
        if not some:
            return
        db.execute("BEGIN")
        for n, holdout, body in some:
            signature = _signature(empty, prompt_text(json.loads(body), system=False))
            keys = (_key(band, signature[band * rows : (band + 1) * rows]) for band in range(bands))
            db.executemany("INSERT INTO bands VALUES (?, ?, ?)", ((key, holdout, n) for key in keys))
        db.execute("COMMIT")


def _signature(empty: Any, text: str) -> Any:
    minhash = empty.copy()
    encoded = [shingle.encode() for shingle in shingles(text)]
    for some in range(0, len(encoded), SLICE):  # the hashes of a slice are a matrix of SLICE x PERMUTATIONS
        minhash.update_batch(encoded[some : some + SLICE])
    return minhash.hashvalues


def _key(band: int, values: Any) -> int:
    digest = hashlib.blake2b(values.tobytes(), digest_size=8, salt=band.to_bytes(2, "big")).digest()
    return int.from_bytes(digest, "big", signed=True)


def _candidates(db: sqlite3.Connection) -> Iterator[tuple[int, int, bool]]:
    """Pairs that share a bucket, training rows of a bucket first."""
    ordered = db.execute("SELECT key, holdout, n FROM bands ORDER BY key, holdout, n")
    for _, bucket in itertools.groupby(ordered, key=lambda row: row[0]):
        train: list[int] = []
        for _, holdout, n in bucket:
            yield from ((n, other, bool(holdout)) for other in (train if holdout else train[:1]))
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
