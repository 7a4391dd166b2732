"""From files to checked, counted rows in the store: sound rows go in, every defect goes into the ledger."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline.data import checks, files, formats, tokens
from pipeline.data import rows as data_rows
from pipeline.data.defects import Defect, Ledger
from pipeline.data.formats import Body, Format, Values

TABLES = (".csv", ".parquet")
Numbered = tuple[int, Body, dict[str, str]]
BATCH_CHARACTERS = 2**20


@dataclass
class FileSummary:
    """What was read from one file, for the report."""

    name: str
    side: int
    format: str = "unknown"
    rows: int = 0
    ignored_columns: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Look:
    """Files read for their defects alone: nothing is stored, and what needs a tokenizer isn't asked."""

    ledger: Ledger
    data: Mapping[str, Any]

    @property
    def special(self) -> re.Pattern[str]:
        """Finds the tokens that must not stand in a text: none are known here."""
        return checks.special_tokens_pattern(())

    def read(self, source: Mapping[str, Any], name: str, path: Path, side: int) -> FileSummary:
        """Read one file of a source; its defects go by `name`."""
        summary = FileSummary(name, side)
        for _ in self._bodies(source, path, summary):
            self.ledger.add_row(name, [])
        return summary

    def _bodies(self, source: Mapping[str, Any], path: Path, summary: FileSummary) -> Iterator[Numbered]:
        """The sound conversations and texts of a file, with their lines and further columns."""
        wanted: Format | None = None
        kept: tuple[str, ...] = ()
        for row in files.read(path):
            summary.rows += row.is_row
            if row.defects:
                self._note(summary.name, row)
                continue
            if wanted is None:
                chosen = choose_format(source, row.values, path, summary.side)
                kept = self._kept(chosen, summary.side)
                lacking = lacking_columns(kept, row.values, path)
                for defect in (chosen, lacking):
                    if isinstance(defect, Defect):
                        self.ledger.add(summary.name, defect)
                if isinstance(chosen, Defect) or lacking:
                    return
                wanted, summary.format = chosen, chosen.name
            summary.ignored_columns |= row.values.keys() - {*wanted.knows, *kept}
            body, columns, found = self._converted(wanted, row.values, kept)
            if found:
                self.ledger.add_row(summary.name, [replace(defect, line=row.line) for defect in found])
            else:
                yield row.line, body, columns

    def _note(self, name: str, row: files.FileRow) -> None:
        if row.is_row:
            self.ledger.add_row(name, list(row.defects))
        else:
            self.ledger.add(name, row.defects[0])

    def _kept(self, chosen: Format | Defect, side: int) -> tuple[str, ...]:
        """The further columns that a file's rows need: those of data.columns, where a row may be held out."""
        never_held = side == data_rows.TRAIN and (self.data["test_datasets"] or chosen == formats.FORMATS["text"])
        return () if never_held else tuple(self.data["columns"])

    def _converted(
        self, wanted: Format, values: Values, kept: Sequence[str]
    ) -> tuple[Body, dict[str, str], list[Defect]]:
        """A row as a conversation or text, its further columns, and all that is wrong with it."""
        found: list[Defect] = []
        columns = formats.further(values, kept, found)
        found += [defect for name, text in columns.items() for defect in checks.half_characters(text, name)]
        if not set(wanted.needs) <= values.keys():
            return "", {}, [formats.not_this_format(values, wanted), *found]
        unfit: list[Defect] = []
        body = wanted.convert(values, unfit)
        return body, columns, [*(unfit or checks.check(body, self.special)), *found]


@dataclass(frozen=True)
class Intake(Look):
    """Where rows go and what they are measured by; `done` is told how many more rows were read."""

    db: sqlite3.Connection
    counter: tokens.TokenCounter
    seed: int
    done: Callable[[int], None]

    @property
    def special(self) -> re.Pattern[str]:
        """Finds the tokenizer's special tokens."""
        return self.counter.special

    def read(self, source: Mapping[str, Any], name: str, path: Path, side: int) -> FileSummary:
        """Read one file of a source into the store; its defects go by `name`."""
        summary = FileSummary(name, side)
        number = data_rows.add_file(self.db, name)
        batch: list[Numbered] = []
        size = 0
        for line, body, columns in self._bodies(source, path, summary):
            batch.append((line, body, columns))
            size += len(body) if isinstance(body, str) else sum(len(message["content"]) for message in body)
            if len(batch) == files.BATCH or size > BATCH_CHARACTERS:
                self._store(batch, summary, number)
                batch, size = [], 0
        self._store(batch, summary, number)
        return summary

    def _store(self, batch: list[Numbered], summary: FileSummary, file: int) -> None:
        if not batch:
            return
        rows = []
        lengths = self.counter.lengths([body for _, body, _ in batch])
        for (line, body, columns), length in zip(batch, lengths, strict=True):
            verdict = length if isinstance(length, Defect) else self._judge(length)
            if isinstance(verdict, Defect):
                self.ledger.add_row(summary.name, [replace(verdict, line=line)])
            else:
                self.ledger.add_row(summary.name, [])
                reason = "too_long" if verdict.drop else None
                rows.append(
                    data_rows.Row(summary.side, file, line, body, verdict.tokens, verdict.answer, reason, columns)
                )
        data_rows.add(self.db, rows, self.seed)
        self.done(len(batch))

    def _judge(self, length: tokens.Length) -> tokens.Length | Defect:
        strategy = self.data["excess_length_strategy"]
        return tokens.judge(length, sequence_len=self.data["sequence_len"], strategy=strategy)


def choose_format(source: Mapping[str, Any], values: Values, path: Path, side: int) -> Format | Defect:
    """The format of a file by its source's type or its first row, or why none fits the file."""
    if source["type"] == "auto":
        chosen = formats.detect(values)
        if chosen is None:
            return Defect("unknown_format", f"has the columns {names(values)}", allowed=_known_formats())
    else:
        chosen = formats.named(source["type"], source["template"])
    missing = [name for name in chosen.needs if name not in values]
    if missing and path.suffix in TABLES:
        no_header = path.suffix == ".csv" and len(missing) == len(chosen.needs)
        what = f"has no column {names(missing)}; its columns are {names(values)}"
        return Defect("no_header" if no_header else "missing_column", what, 1 if no_header else None)
    if side == data_rows.TEST and chosen.name == "text":
        return Defect("text_in_holdout", "holds texts without an answer, which can't be scored")
    return chosen


def lacking_columns(kept: Sequence[str], values: Values, path: Path) -> Defect | None:
    """What a table lacks of data.columns; in other files each row is asked by itself."""
    missing = [name for name in kept if name not in values]
    if not missing or path.suffix not in TABLES:
        return None
    what = f"has no column {names(missing)}; its columns are {names(values)}"
    return Defect("missing_further_column", what, 1 if path.suffix == ".csv" else None)


def names(columns: Iterable[Any]) -> str:
    """Columns' names as a message lists them."""
    return ", ".join(str(name)[:40] for name in columns) or "none"


def _known_formats() -> str:
    return "; ".join(f"{known.name}: {' + '.join(known.needs)}" for known in formats.FORMATS.values())
