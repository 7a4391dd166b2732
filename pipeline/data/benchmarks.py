"""Public benchmarks, read so that their documents can be recognized in training rows.

A document is a row; in a .txt file it is a line. Its passages are the texts in it, at any depth, or those of the columns
that the config names. A document is recognized by word n-grams:

- the n-grams of each passage of at least `ngram` words;
- a shorter passage of at least INSIDE words, as a whole, unless it mostly counts and enumerates (a 2 b 4 c 8 d 16);
- its longest passage, where no passage qualifies. Below INSIDE words it must be all of a message.

A defect in a benchmark's file stops the run: a document that can't be read can't be looked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.data import checks, files, rows
from pipeline.data.defects import Defect, DefectLog
from pipeline.data.formats import Values
from pipeline.data.ngrams import INSIDE, Index, Needle, grams_of
from pipeline.data.reading import TABLES, names

KIND = "benchmark"


@dataclass
class BenchmarkSummary:
    """A benchmark's file: its documents, and how many of them are too short to be looked for."""

    name: str
    documents: int = 0
    too_short: int = 0


@dataclass(frozen=True)
class DocumentReader:
    """Reads documents into `index`; `ngram` is the number of words of an n-gram."""

    index: Index
    log: DefectLog
    ngram: int

    def read(self, columns: Sequence[str], name: str, path: Path) -> BenchmarkSummary:
        """Read one file and log its defects under `name`. Only `columns` count; without any, all do."""
        summary = BenchmarkSummary(name)
        file = rows.add_file(self.index.db, name)
        self.index.add(self._needles(columns, path, file, summary))
        return summary

    def _needles(self, columns: Sequence[str], path: Path, file: int, summary: BenchmarkSummary) -> Iterator[Needle]:
        for row in files.read(path):
            texts = list(passages({name: row.values[name] for name in columns if name in row.values} or row.values))
            defects = row.defects or tuple(_defects(row.values, texts, columns, path))
            for defect in defects:
                self.log.add(summary.name, replace(defect, line=defect.line or row.line), stops=True)
            if any(defect.kind == "missing_benchmark_column" for defect in defects):
                return
            if not defects:
                grams = grams_of(telling_passages([rows.words(text) for text in texts], self.ngram), self.ngram)
                summary.documents += 1
                summary.too_short += not grams
                yield Needle(KIND, file, row.line, " ".join(texts), grams)


def _defects(values: Values, texts: Sequence[str], columns: Sequence[str], path: Path) -> Iterator[Defect]:
    """The columns of the config that a row lacks (a table lacks them in every row), and text that no file can hold."""
    if missing := [name for name in columns if name not in values]:
        kind = "missing_benchmark_column" if path.suffix in TABLES else "missing_field"
        yield Defect(kind, f"lacks {names(missing)}", key="data.benchmarks.columns", allowed=names(values))
    for text in texts:
        yield from checks.half_characters(text, "document")


def passages(value: Any) -> Iterator[str]:
    """The texts in a value; of lists and objects, those of every entry."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for entry in value.values() if isinstance(value, Mapping) else value:
            yield from passages(entry)


def telling_passages(texts: Sequence[Sequence[str]], ngram: int) -> list[Sequence[str]]:
    """The passages, as words, by which a document is recognized."""
    telling = [text for text in texts if len(text) >= ngram or (len(text) >= INSIDE and _tells(text))]
    return telling or [max(texts, key=len, default=())]


def _tells(text: Sequence[str]) -> bool:
    """Whether half of the words are more than a number, a letter or two."""
    return 2 * sum(not word.isascii() or (len(word) > 2 and not word.isdigit()) for word in text) >= len(text)
