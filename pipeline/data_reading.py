"""From files to checked, counted rows in the store: sound rows go in, every defect goes into the ledger."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline import data_checks, data_files, data_formats, data_rows, data_tokens
from pipeline.data_defects import Defect, Ledger
from pipeline.data_formats import Body, Format, Values

TABLES = (".csv", ".parquet")
Numbered = tuple[int, Body]
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
class Intake:
    """Where rows go and what they are measured by; `done` is told how many more rows were read."""

    db: sqlite3.Connection
    ledger: Ledger
    counter: data_tokens.TokenCounter
    data: Mapping[str, Any]
    seed: int
    done: Callable[[int], None]

    def read(self, source: Mapping[str, Any], name: str, path: Path, side: int) -> FileSummary:
        """Read one file of a source; its defects go by `name`."""
        summary = FileSummary(name, side)
        number = data_rows.add_file(self.db, name)
        batch: list[Numbered] = []
        size = 0
        for line, body in self._bodies(source, path, summary):
            batch.append((line, body))
            size += len(body) if isinstance(body, str) else sum(len(message["content"]) for message in body)
            if len(batch) == data_files.BATCH or size > BATCH_CHARACTERS:
                self._store(batch, summary, number)
                batch, size = [], 0
        self._store(batch, summary, number)
        return summary

    def _bodies(self, source: Mapping[str, Any], path: Path, summary: FileSummary) -> Iterator[Numbered]:
        """The sound conversations and texts of a file, with their lines."""
        wanted: Format | None = None
        for row in data_files.read(path):
            summary.rows += row.is_row
            if row.defects:
                self._note(summary.name, row)
                continue
            if wanted is None:
                chosen = choose_format(source, row.values, path, summary.side)
                if isinstance(chosen, Defect):
                    self.ledger.add(summary.name, chosen)
                    return
                wanted, summary.format = chosen, chosen.name
            summary.ignored_columns |= row.values.keys() - set(wanted.knows)
            body, found = self._converted(wanted, row.values)
            if found:
                self.ledger.add_row(summary.name, [replace(defect, line=row.line) for defect in found])
            else:
                yield row.line, body

    def _note(self, name: str, row: data_files.FileRow) -> None:
        if row.is_row:
            self.ledger.add_row(name, list(row.defects))
        else:
            self.ledger.add(name, row.defects[0])

    def _converted(self, wanted: Format, values: Values) -> tuple[Body, list[Defect]]:
        """A row as a conversation or text, with all that is wrong with it."""
        if not set(wanted.needs) <= values.keys():
            return "", [data_formats.not_this_format(values, wanted)]
        found: list[Defect] = []
        body = wanted.convert(values, found)
        return body, found or data_checks.check(body, self.counter.special)

    def _store(self, batch: list[Numbered], summary: FileSummary, file: int) -> None:
        if not batch:
            return
        rows = []
        lengths = self.counter.lengths([body for _, body in batch])
        for (line, body), length in zip(batch, lengths, strict=True):
            verdict = length if isinstance(length, Defect) else self._judge(length)
            if isinstance(verdict, Defect):
                self.ledger.add_row(summary.name, [replace(verdict, line=line)])
            else:
                self.ledger.add_row(summary.name, [])
                reason = "too_long" if verdict.drop else None
                rows.append(data_rows.Row(summary.side, file, line, body, verdict.tokens, verdict.answer, reason))
        data_rows.add(self.db, rows, self.seed)
        self.done(len(batch))

    def _judge(self, length: data_tokens.Length) -> data_tokens.Length | Defect:
        strategy = self.data["excess_length_strategy"]
        return data_tokens.judge(length, sequence_len=self.data["sequence_len"], strategy=strategy)


def choose_format(source: Mapping[str, Any], values: Values, path: Path, side: int) -> Format | Defect:
    """The format of a file by its source's type or its first row, or why none fits the file."""
    if source["type"] == "auto":
        chosen = data_formats.detect(values)
        if chosen is None:
            return Defect("unknown_format", f"has the columns {_names(values)}", allowed=_known_formats())
    else:
        chosen = data_formats.named(source["type"], source["template"])
    missing = [name for name in chosen.needs if name not in values]
    if missing and path.suffix in TABLES:
        no_header = path.suffix == ".csv" and len(missing) == len(chosen.needs)
        what = f"has no column {_names(missing)}; its columns are {_names(values)}"
        return Defect("no_header" if no_header else "missing_column", what, 1 if no_header else None)
    if side == data_rows.TEST and chosen.name == "text":
        return Defect("text_in_holdout", "holds texts without an answer, which can't be scored")
    return chosen


def _names(names: Any) -> str:
    return ", ".join(str(name)[:40] for name in names) or "none"


def _known_formats() -> str:
    return "; ".join(f"{known.name}: {' + '.join(known.needs)}" for known in data_formats.FORMATS.values())
