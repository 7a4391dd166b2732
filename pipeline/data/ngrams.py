"""Texts found again in rows by the word n-grams that they share, however long the rows are.

What is looked for is a needle: a benchmark's document, a holdout row's prompt or its answer. Needles' n-grams are
64-bit hashes in the run's SQLite file, where every row's n-grams are looked up; a filter of fixed size lets only
those through that may be there. So memory stays the same for any number of needles and rows; disk grows by
about 60 bytes for each n-gram of a needle and 40 for each place where one is found. Two different n-grams have
the same hash with a probability of 2**-58 at most.

What many texts share is no finding. An n-gram counts for nothing that a second needle of its kind has too and
either more than COMMON needles or more than COMMON rows: a phrase of the trade (GPT-3 ignored what is in more than
ten training documents, arXiv 2005.14165, appendix C). One that most needles or most rows have, or more than COMMON
needles that are a tenth of all, is a template's, such as a system message's: it is left out where the share of a
needle that a row has is counted. A text of fewer than INSIDE words is too likely to stand in a longer one by chance:
it is found only as the whole of a message, and one of fewer than SHORTEST words not at all.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from pipeline.data.rows import words

CANDIDATES = 8
COMMON = 10
INSIDE = 8
SHORTEST = 3
LONGEST = 64
BATCH_CHARACTERS = 2**17
FILTER_BITS = 2**26
SLICE = 4096

Hashes = NDArray[np.uint64]
Keys = NDArray[np.int64]
Gram = tuple[int, int, int]
Report = Callable[[int, int], None]

SCHEMA = """
CREATE TABLE needles (
    n INTEGER PRIMARY KEY,
    kind TEXT NOT NULL,
    file INTEGER NOT NULL, line INTEGER NOT NULL,
    row INTEGER,                -- of a holdout row, its number
    text TEXT NOT NULL          -- the beginning, to be shown
);
CREATE TABLE grams (key INTEGER NOT NULL, kind TEXT NOT NULL, needle INTEGER NOT NULL);
CREATE TABLE hits (key INTEGER NOT NULL, row INTEGER NOT NULL, shown INTEGER NOT NULL);
CREATE TABLE shared (key INTEGER NOT NULL, kind TEXT NOT NULL, template INTEGER NOT NULL);
CREATE TABLE templates (key INTEGER NOT NULL, kind TEXT NOT NULL);
"""


@dataclass(frozen=True)
class Needle:
    """A text to be looked for: where it stands, how it begins, its n-grams, and the number of a holdout row."""

    kind: str
    file: int
    line: int
    text: str
    grams: list[Gram]
    row: int | None = None


@dataclass(frozen=True)
class Text:
    """A row's message or text; `shown` when a model reads it and isn't trained to say it."""

    row: int
    text: str
    shown: bool


@lru_cache(maxsize=2**13)
def _hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")


# Odd, so that no bit of a word is lost; one a place, so that order counts.
FACTORS = np.array([_hash(f"place {n}") | 1 for n in range(LONGEST)], dtype=np.uint64)


@dataclass(frozen=True)
class Words:
    """The words of several texts, hashed, one text after the other."""

    hashes: Hashes
    lengths: NDArray[np.int64]

    @classmethod
    def of(cls, texts: Sequence[Sequence[str]]) -> Words:
        """Texts that are words already."""
        lengths = np.array([len(text) for text in texts], dtype=np.int64)
        flat = (_hash(word) for text in texts for word in text)
        return cls(np.fromiter(flat, np.uint64, int(lengths.sum())), lengths)

    def ngrams(self, sizes: Iterable[int]) -> Iterator[tuple[int, NDArray[np.int64], Keys]]:
        """Each size's n-grams: the places of their first words, and their keys. Below INSIDE only whole texts are one."""
        wanted = set(sizes)
        total = len(self.hashes)
        whole = np.repeat(self.lengths, self.lengths)
        left = np.repeat(np.cumsum(self.lengths), self.lengths) - np.arange(total)
        sums = np.zeros(total, dtype=np.uint64)
        for size in range(1, min(max(wanted, default=0), total) + 1):
            sums = sums[: total - size + 1] + self.hashes[size - 1 :] * FACTORS[size - 1]
            if size in wanted:
                fits = left[: len(sums)] >= size
                if size < INSIDE:
                    fits &= (left[: len(sums)] == size) & (whole[: len(sums)] == size)
                places = np.flatnonzero(fits)
                yield size, places, sums[places].view(np.int64)


def grams_of(texts: Sequence[Sequence[str]], size: int) -> list[Gram]:
    """The (key, place, size) of all n-grams in texts of words, in order; a shorter text is one as a whole."""
    found: list[Gram] = []
    start = 0
    for text in texts:
        wanted = min(size, len(text))
        for _, places, keys in Words.of([text]).ngrams([wanted] if wanted >= SHORTEST else []):
            found += [(key, start + n, wanted) for key, n in zip(keys.tolist(), places.tolist(), strict=True)]
        start += len(text)
    return found


@dataclass
class Filter:
    """Says of most keys that aren't among those added that they aren't; a bit a key (a Bloom filter of one hash)."""

    bits: NDArray[np.uint8] = field(default_factory=lambda: np.zeros(FILTER_BITS // 8, dtype=np.uint8))

    def add(self, keys: Keys) -> None:
        """Let these keys through from now on."""
        byte, bit = self._place(keys)
        np.bitwise_or.at(self.bits, byte, bit)

    def may_have(self, keys: Keys) -> NDArray[np.bool_]:
        """Which of the keys may have been added."""
        byte, bit = self._place(keys)
        found: NDArray[np.bool_] = (self.bits[byte] & bit) != 0
        return found

    def _place(self, keys: Keys) -> tuple[Hashes, NDArray[np.uint8]]:
        bit = keys.view(np.uint64) % np.uint64(FILTER_BITS)
        return bit >> np.uint64(3), np.uint8(1) << (bit & np.uint64(7)).astype(np.uint8)


class Index:
    """Needles by their n-grams, in the run's SQLite file: first they are added, then rows are searched once."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self.db = db
        self.sizes: set[int] = set()
        db.executescript(SCHEMA)

    def add(self, needles: Iterable[Needle]) -> None:
        """Take needles in."""
        self.db.execute("BEGIN")
        for needle in needles:
            where = (needle.kind, needle.file, needle.line, needle.row, needle.text[:300])
            query = "INSERT INTO needles (kind, file, line, row, text) VALUES (?, ?, ?, ?, ?)"
            number = self.db.execute(query, where).lastrowid
            grams = ((key, needle.kind, number) for key in dict.fromkeys(key for key, _, _ in needle.grams))
            self.db.executemany("INSERT INTO grams VALUES (?, ?, ?)", grams)
            self.sizes.update(size for _, _, size in needle.grams)
        self.db.execute("COMMIT")

    def search(self, texts: Iterable[Text], rows: int, report: Report) -> None:
        """Note which rows have which needles' n-grams, then forget those that don't count.

        `texts` come row by row; `report` is told how many of the `rows` have been searched.
        """
        self.db.execute("CREATE INDEX grams_key ON grams (key, kind, needle)")
        self._forget_what_needles_share()
        known = self._filter()
        searched = 0
        for batch in _batches(texts):
            self._note(batch, known)
            searched += len({text.row for text in batch})
            report(min(searched, rows), rows)
        self.db.execute("CREATE INDEX hits_key ON hits (key, row, shown)")
        self._forget_what_rows_share(rows)
        self.db.execute("CREATE INDEX grams_needle ON grams (needle)")
        self.db.execute("CREATE INDEX templates_key ON templates (key, kind)")

    def candidates(self, kind: str, *, shown: bool = False) -> Iterator[tuple[int, list[int]]]:
        """Each needle of a kind of which a row has an n-gram, and up to CANDIDATES such rows, those with most first.

        `shown`: what the assistant says in a row doesn't count.
        """
        query = (
            "SELECT needle, row, count(DISTINCT key) FROM hits CROSS JOIN grams USING (key)"
            " WHERE kind = ? AND shown >= ? GROUP BY needle, row ORDER BY needle, row"
        )
        found = self.db.execute(query, (kind, shown))
        for needle, group in itertools.groupby(found, key=lambda match: match[0]):
            most = heapq.nsmallest(CANDIDATES, ((-shared, row) for _, row, shared in group))
            yield needle, [row for _, row in most]

    def share(self, kind: str, texts: Sequence[Sequence[str]], row: Iterable[Text]) -> float:
        """The share of a needle's n-grams that a row's texts have, of those that touch no template; 0 where all do."""
        grams = grams_of(texts, INSIDE)
        template = np.zeros(sum(map(len, texts)), dtype=np.bool_)
        for key, place, size in grams:
            template[place : place + size] |= self._is_template(kind, key)
        own = [key for key, place, size in grams if not template[place : place + size].any()]
        hashed = Words.of([words(text.text) for text in row])
        theirs = {key for _, _, keys in hashed.ngrams(range(SHORTEST, INSIDE + 1)) for key in keys.tolist()}
        return sum(key in theirs for key in own) / len(own) if own else 0.0

    def part(self, needle: int, row: int) -> float:
        """The share of a needle's n-grams that count which a row has."""
        (total,) = self.db.execute("SELECT count(*) FROM grams WHERE needle = ?", (needle,)).fetchone()
        query = "SELECT count(DISTINCT key) FROM grams JOIN hits USING (key) WHERE needle = ? AND row = ?"
        return float(self.db.execute(query, (needle, row)).fetchone()[0] / total)

    def shared(self, needle: int, row: int, texts: Iterable[Text]) -> str:
        """The longest n-gram that counts of a needle in a row's texts, the first of them, in folded words."""
        query = "SELECT key FROM hits JOIN grams USING (key) WHERE needle = ? AND row = ?"
        keys = [key for (key,) in self.db.execute(query, (needle, row))]
        found = [(size, " ".join(some[place : place + size])) for some in (words(text.text) for text in texts)
                 for size, places, theirs in Words.of([some]).ngrams(self.sizes)
                 for place in places[np.isin(theirs, keys)].tolist()]  # fmt: skip
        return max(found, key=lambda gram: gram[0])[1]

    def count(self, kind: str) -> int:
        """How many needles of a kind there are."""
        return int(self.db.execute("SELECT count(*) FROM needles WHERE kind = ?", (kind,)).fetchone()[0])

    def _filter(self) -> Filter:
        known = Filter()
        reading = self.db.execute("SELECT DISTINCT key FROM grams")
        while some := reading.fetchmany(SLICE):
            known.add(np.array(some, dtype=np.int64).ravel())
        return known

    def _note(self, batch: list[Text], known: Filter) -> None:
        hashed = Words.of([words(text.text) for text in batch])
        place_of = np.repeat(np.arange(len(batch)), hashed.lengths)
        where = np.array([(text.row, text.shown) for text in batch], dtype=np.int64)
        for _, places, keys in hashed.ngrams(self.sizes):
            maybe = known.may_have(keys)
            found = np.column_stack([keys[maybe], where[place_of[places[maybe]]]])
            self.db.execute("BEGIN")
            self.db.executemany(
                "INSERT INTO hits SELECT ?1, ?2, ?3 WHERE EXISTS (SELECT 1 FROM grams WHERE key = ?1)",
                np.unique(found, axis=0).tolist(),
            )
            self.db.execute("COMMIT")

    def _is_template(self, kind: str, key: int) -> bool:
        return bool(self.db.execute("SELECT 1 FROM templates WHERE key = ? AND kind = ?", (key, kind)).fetchone())

    def _forget_what_needles_share(self) -> None:
        for kind, total in self.db.execute("SELECT kind, count(*) FROM needles GROUP BY kind").fetchall():
            self._forget(
                "SELECT key, kind, 10 * count(*) > :total FROM grams WHERE kind = :kind GROUP BY key"
                " HAVING count(*) > 1 AND (count(*) > :common OR 2 * count(*) > :total)",
                {"kind": kind, "common": COMMON, "total": total},
            )

    def _forget_what_rows_share(self, total: int) -> None:
        self._forget(
            "SELECT key, kind, 2 * max(rows) > :total FROM"
            " (SELECT key, count(DISTINCT row) AS rows FROM hits GROUP BY key HAVING rows > :common)"
            " JOIN grams USING (key) GROUP BY key, kind HAVING count(*) > 1 OR 2 * max(rows) > :total",
            {"common": COMMON, "total": total},
        )

    def _forget(self, shared: str, values: Mapping[str, str | int]) -> None:
        """Forget the n-grams that `shared` selects, with their kind and whether they are a template's."""
        self.db.execute("DELETE FROM shared")
        self.db.execute(f"INSERT INTO shared {shared}", values)
        self.db.execute("INSERT INTO templates SELECT key, kind FROM shared WHERE template")
        self.db.execute("DELETE FROM grams WHERE (key, kind) IN (SELECT key, kind FROM shared)")


def _batches(texts: Iterable[Text]) -> Iterator[list[Text]]:
    """Rows' texts in batches of about BATCH_CHARACTERS, no row in two of them."""
    batch: list[Text] = []
    size = 0
    for _, row in itertools.groupby(texts, key=lambda text: text.row):
        some = list(row)
        batch += some
        size += sum(len(text.text) for text in some)
        if size > BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
