"""Texts recognized in rows by the word n-grams that they share, however long the rows are.

A needle is a text to look for: a benchmark's document, a holdout row's prompt or its answer. The needles' n-grams are
64-bit hashes in the run's SQLite file, where every row's n-grams are looked up. A filter of fixed size stops most keys
that no needle has. Costs:

- memory: the same for any number of needles and rows;
- disk: about 60 bytes for each n-gram of a needle, and 40 for each place in a row that has one;
- two different n-grams have the same hash with a probability of 2**-58 at most.

Phrases that many texts share must not count as leaks:

- Ignore an n-gram if at least two needles contain it and it occurs in more than COMMON needles or more than COMMON
  rows. Needles are counted by kind. GPT-3 ignored n-grams in more than ten training documents (arXiv 2005.14165, appendix C).
- Ignore an n-gram that most needles (at least two) or most rows (more than COMMON) contain.
- An n-gram of most needles or rows, or of more than COMMON needles and a tenth of all, belongs to a template.
  A system message is one. Words in a template don't count in the share of a needle that a row has.

A text of fewer than INSIDE words is likely to be in a longer one by chance. It is found only as the whole of a message;
a text of fewer than SHORTEST words is never found.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import sqlite3
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
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
    text TEXT NOT NULL          -- its beginning, for messages
);
CREATE TABLE grams (key INTEGER NOT NULL, kind TEXT NOT NULL, needle INTEGER NOT NULL);
CREATE TABLE hits (key INTEGER NOT NULL, row INTEGER NOT NULL, is_prompt INTEGER NOT NULL);
CREATE TABLE shared (key INTEGER NOT NULL, kind TEXT NOT NULL, template INTEGER NOT NULL);
CREATE TABLE templates (key INTEGER NOT NULL, kind TEXT NOT NULL);
"""


@dataclass(frozen=True)
class Needle:
    """A text to look for: where it stands, how it begins, its n-grams, and of a holdout row its number."""

    kind: str
    file: int
    line: int
    text: str
    grams: list[Gram]
    row: int | None = None


@dataclass(frozen=True)
class Text:
    """A row's message or text; `is_prompt` when a model reads it and isn't trained to say it."""

    row: int
    text: str
    is_prompt: bool


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
        """The hashes of texts that are split into words."""
        lengths = np.array([len(text) for text in texts], dtype=np.int64)
        flat = (_hash(word) for text in texts for word in text)
        return cls(np.fromiter(flat, np.uint64, int(lengths.sum())), lengths)

    def ngrams(self, sizes: Collection[int]) -> Iterator[tuple[int, NDArray[np.int64], Keys]]:
        """Each size's n-grams: the places of their first words, and their keys. Below INSIDE only whole texts are one."""
        total = len(self.hashes)
        whole = np.repeat(self.lengths, self.lengths)
        left = np.repeat(np.cumsum(self.lengths), self.lengths) - np.arange(total)
        sums = np.zeros(total, dtype=np.uint64)
        for size in range(1, min(max(sizes, default=0), total) + 1):
            sums = sums[: total - size + 1] + self.hashes[size - 1 :] * FACTORS[size - 1]
            if size in sizes:
                fits = left[: len(sums)] >= size
                if size < INSIDE:
                    fits &= (left[: len(sums)] == size) & (whole[: len(sums)] == size)
                places = np.flatnonzero(fits)
                yield size, places, sums[places].view(np.int64)


def grams_of(texts: Sequence[Sequence[str]], size: int) -> list[Gram]:
    """The (key, place, size) of all n-grams in texts of words, in order; a shorter text is one as a whole."""
    grams: list[Gram] = []
    start = 0
    for text in texts:
        length = min(size, len(text))
        for _, places, keys in Words.of([text]).ngrams([length] if length >= SHORTEST else []):
            grams += [(key, start + n, length) for key, n in zip(keys.tolist(), places.tolist(), strict=True)]
        start += len(text)
    return grams


@dataclass
class Filter:
    """A Bloom filter of one hash, a bit a key: it passes every key that was added and few others."""

    bits: NDArray[np.uint8] = field(default_factory=lambda: np.zeros(FILTER_BITS // 8, dtype=np.uint8))

    def add(self, keys: Keys) -> None:
        """Let these keys through from now on."""
        byte, bit = self._place(keys)
        np.bitwise_or.at(self.bits, byte, bit)

    def may_have(self, keys: Keys) -> NDArray[np.bool_]:
        """Which of the keys may have been added."""
        byte, bit = self._place(keys)
        passes: NDArray[np.bool_] = (self.bits[byte] & bit) != 0
        return passes

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
        """Store needles and their n-grams."""
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

        `texts` come row by row; `report` is called with the number of rows searched so far, and of all `rows`.
        """
        self.db.execute("CREATE INDEX grams_key ON grams (key, kind, needle)")
        self._forget_what_needles_share()
        needle_filter = self._filter()
        rows_so_far = 0
        for batch in _batches(texts):
            self._note(batch, needle_filter)
            rows_so_far += len({text.row for text in batch})
            report(min(rows_so_far, rows), rows)
        self.db.execute("CREATE INDEX hits_key ON hits (key, row, is_prompt)")
        self._forget_what_rows_share(rows)
        self.db.execute("CREATE INDEX grams_needle ON grams (needle)")
        self.db.execute("CREATE INDEX templates_key ON templates (key, kind)")

    def candidates(self, kind: str, *, prompts_only: bool = False) -> Iterator[tuple[int, list[int]]]:
        """Each needle of a kind of which a row has an n-gram, and up to CANDIDATES such rows, those with most first.

        `prompts_only` leaves out assistant messages.
        """
        query = (
            "SELECT needle, row, count(DISTINCT key) FROM hits CROSS JOIN grams USING (key)"
            " WHERE kind = ? AND is_prompt >= ? GROUP BY needle, row ORDER BY needle, row"
        )
        matches = self.db.execute(query, (kind, prompts_only))
        for needle, group in itertools.groupby(matches, key=lambda match: match[0]):
            most = heapq.nlargest(CANDIDATES, group, key=lambda match: match[2])  # of equals the first rows
            yield needle, [row for _, row, _ in most]

    def share(self, kind: str, texts: Sequence[Sequence[str]], row: Iterable[Text]) -> float:
        """The share of a needle's n-grams outside templates that a row's texts have; 0 if all touch a template."""
        grams = grams_of(texts, INSIDE)
        template = np.zeros(sum(map(len, texts)), dtype=np.bool_)
        for key, place, size in grams:
            template[place : place + size] |= self._is_template(kind, key)
        own = [key for key, place, size in grams if not template[place : place + size].any()]
        row_words = Words.of([words(text.text) for text in row])
        row_keys = {key for _, _, keys in row_words.ngrams(range(SHORTEST, INSIDE + 1)) for key in keys.tolist()}
        return sum(key in row_keys for key in own) / len(own) if own else 0.0

    def share_of_counting(self, needle: int, row: int) -> float:
        """The share of a needle's counting n-grams that a row has."""
        (total,) = self.db.execute("SELECT count(*) FROM grams WHERE needle = ?", (needle,)).fetchone()
        query = "SELECT count(DISTINCT key) FROM grams JOIN hits USING (key) WHERE needle = ? AND row = ?"
        return float(self.db.execute(query, (needle, row)).fetchone()[0] / total)

    def longest_in_common(self, needle: int, row: int, texts: Iterable[Text]) -> str:
        """The longest counting n-gram of a needle in a row's texts, the first of several, in folded words."""
        query = "SELECT key FROM hits JOIN grams USING (key) WHERE needle = ? AND row = ?"
        keys = [key for (key,) in self.db.execute(query, (needle, row))]
        matches = [
            text_words[place : place + size]
            for text_words in (words(text.text) for text in texts)
            for size, places, text_keys in Words.of([text_words]).ngrams(self.sizes)
            for place in places[np.isin(text_keys, keys)].tolist()
        ]
        longest: list[str] = max(matches, key=len)
        return " ".join(longest)

    def count(self, kind: str) -> int:
        """How many needles of a kind there are."""
        return int(self.db.execute("SELECT count(*) FROM needles WHERE kind = ?", (kind,)).fetchone()[0])

    def _filter(self) -> Filter:
        needle_filter = Filter()
        cursor = self.db.execute("SELECT DISTINCT key FROM grams")
        while keys := cursor.fetchmany(SLICE):
            needle_filter.add(np.array(keys, dtype=np.int64).ravel())
        return needle_filter

    def _note(self, batch: list[Text], needle_filter: Filter) -> None:
        batch_words = Words.of([words(text.text) for text in batch])
        text_of_word = np.repeat(np.arange(len(batch)), batch_words.lengths)
        rows = np.array([(text.row, text.is_prompt) for text in batch], dtype=np.int64)
        for _, places, keys in batch_words.ngrams(self.sizes):
            maybe = needle_filter.may_have(keys)
            hits = np.column_stack([keys[maybe], rows[text_of_word[places[maybe]]]])
            self.db.execute("BEGIN")
            self.db.executemany(
                "INSERT INTO hits SELECT ?1, ?2, ?3 WHERE EXISTS (SELECT 1 FROM grams WHERE key = ?1)",
                np.unique(hits, axis=0).tolist(),
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

    def _forget(self, selection: str, parameters: Mapping[str, str | int]) -> None:
        """Forget the n-grams that a query selects; its columns are the key, the kind and whether it is a template's."""
        self.db.execute("DELETE FROM shared")
        self.db.execute(f"INSERT INTO shared {selection}", parameters)
        self.db.execute("INSERT INTO templates SELECT key, kind FROM shared WHERE template")
        self.db.execute("DELETE FROM grams WHERE (key, kind) IN (SELECT key, kind FROM shared)")


def _batches(texts: Iterable[Text]) -> Iterator[list[Text]]:
    """Rows' texts in batches of about BATCH_CHARACTERS; all texts of a row are in one batch."""
    batch: list[Text] = []
    size = 0
    for _, row in itertools.groupby(texts, key=lambda text: text.row):
        row_texts = list(row)
        batch += row_texts
        size += sum(len(text.text) for text in row_texts)
        if size > BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
