"""From files to checked, counted rows in the store: sound rows go into it, every defect goes into the log."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline.data import checks, files, formats, tokens
from pipeline.data import rows as data_rows
from pipeline.data.defects import Defect, DefectLog
from pipeline.data.formats import Body, Format, Values

TABLES = (".csv", ".parquet")
Numbered = tuple[int, Body, dict[str, str]]
BATCH_CHARACTERS = 2**20
NO_TOKENS = checks.special_tokens_pattern(())


@dataclass
class FileSummary:
    """One file's share of the report: its side, format, number of rows and ignored columns."""

    name: str
    side: int
    format: str = "unknown"
    rows: int = 0
    ignored_columns: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class RowReader:
    """Reads files as conversations and texts; defects go to `log`. A text must not contain a match of `special`."""

    log: DefectLog
    data: Mapping[str, Any]
    special: re.Pattern[str] = NO_TOKENS

    def sound_rows(self, source: Mapping[str, Any], path: Path, summary: FileSummary) -> Iterator[Numbered]:
        """The sound conversations and texts of a file, with their lines and further columns."""
        file_format: Format | None = None
        further: tuple[str, ...] = ()
        for row in files.read(path):
            summary.rows += row.is_row
            if row.defects:
                self._note(summary.name, row)
                continue
            if file_format is None:
                first_format = choose_format(source, row.values, path, summary.side)
                further = self._further_columns(first_format, summary.side)
                lacking = lacking_columns(further, row.values, path)
                for defect in (first_format, lacking):
                    if isinstance(defect, Defect):
                        self.log.add(summary.name, defect)
                if isinstance(first_format, Defect) or lacking:
                    return
                file_format, summary.format = first_format, first_format.name
            summary.ignored_columns |= row.values.keys() - {*file_format.knows, *further}
            body, columns, defects = self._convert(file_format, row.values, further)
            if defects:
                self.log.add_row(summary.name, [replace(defect, line=row.line) for defect in defects])
            else:
                yield row.line, body, columns

    def _note(self, name: str, row: files.FileRow) -> None:
        if row.is_row:
            self.log.add_row(name, list(row.defects))
        else:
            self.log.add(name, row.defects[0])

    def _further_columns(self, first_format: Format | Defect, side: int) -> tuple[str, ...]:
        """The columns of data.columns, if a row of the file may go to the holdout."""
        trains_only = self.data["test_datasets"] or first_format == formats.FORMATS["text"]
        return () if side == data_rows.TRAIN and trains_only else tuple(self.data["columns"])

    def _convert(
        self, file_format: Format, values: Values, further: Sequence[str]
    ) -> tuple[Body, dict[str, str], list[Defect]]:
        """A row as a conversation or text, its further columns, and all its defects."""
        column_defects: list[Defect] = []
        columns = formats.further(values, further, column_defects)
        column_defects += [defect for name, text in columns.items() for defect in checks.half_characters(text, name)]
        if not set(file_format.needs) <= values.keys():
            return "", {}, [formats.not_this_format(values, file_format), *column_defects]
        defects: list[Defect] = []
        body = file_format.convert(values, defects)
        return body, columns, [*(defects or checks.check(body, self.special)), *column_defects]


def check_file(reader: RowReader, source: Mapping[str, Any], name: str, path: Path, side: int) -> None:
    """Count the rows and log the defects of one file under `name`; store nothing and count no tokens."""
    for _ in reader.sound_rows(source, path, FileSummary(name, side)):
        reader.log.add_row(name, [])


@dataclass(frozen=True)
class Intake:
    """Stores sound rows with their lengths; `report` is called with the number of rows since its last call."""

    reader: RowReader
    db: sqlite3.Connection
    counter: tokens.TokenCounter
    seed: int
    report: Callable[[int], None]

    def read(self, source: Mapping[str, Any], name: str, path: Path, side: int) -> FileSummary:
        """Read one file of a source into the store; its defects go by `name`."""
        summary = FileSummary(name, side)
        number = data_rows.add_file(self.db, name)
        batch: list[Numbered] = []
        size = 0
        for line, body, columns in self.reader.sound_rows(source, path, summary):
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
        for (line, body, columns), length_or_refusal in zip(batch, lengths, strict=True):
            length = self._check_length(length_or_refusal)
            if isinstance(length, Defect):
                self.reader.log.add_row(summary.name, [replace(length, line=line)])
            else:
                self.reader.log.add_row(summary.name, [])
                reason = "too_long" if length.drop else None
                rows.append(
                    data_rows.SoundRow(summary.side, file, line, body, length.tokens, length.answer, reason, columns)
                )
        data_rows.add(self.db, rows, self.seed)
        self.report(len(batch))

    def _check_length(self, length: tokens.Length | Defect) -> tokens.Length | Defect:
        if isinstance(length, Defect):
            return length
        data = self.reader.data
        return tokens.length_or_defect(
            length, sequence_len=data["sequence_len"], strategy=data["excess_length_strategy"]
        )


def choose_format(source: Mapping[str, Any], values: Values, path: Path, side: int) -> Format | Defect:
    """The format of a file by its source's type or its first row, or the defect if none fits the file."""
    if source["type"] == "auto":
        file_format = formats.detect(values)
        if file_format is None:
            return Defect("unknown_format", f"has the columns {names(values)}", allowed=_all_formats())
    else:
        file_format = formats.named(source["type"], source["template"])
    missing = [name for name in file_format.needs if name not in values]
    if missing and path.suffix in TABLES:
        no_header = path.suffix == ".csv" and len(missing) == len(file_format.needs)
        mistake = f"lacks the column {names(missing)}; its columns are {names(values)}"
        return Defect("no_header" if no_header else "missing_column", mistake, 1 if no_header else None)
    if side == data_rows.TEST and file_format.name == "text":
        return Defect("text_in_holdout", "holds texts without an answer, which can't be scored")
    return file_format


def lacking_columns(columns: Sequence[str], values: Values, path: Path) -> Defect | None:
    """The defect of a table that lacks columns of data.columns; in other files each row is checked by itself."""
    missing = [name for name in columns if name not in values]
    if not missing or path.suffix not in TABLES:
        return None
    mistake = f"lacks the column {names(missing)}; its columns are {names(values)}"
    return Defect("missing_further_column", mistake, 1 if path.suffix == ".csv" else None)


def names(columns: Iterable[Any]) -> str:
    """Columns' names as a message lists them."""
    return ", ".join(str(name)[:40] for name in columns) or "none"


def _all_formats() -> str:
    return "; ".join(f"{name}: {' + '.join(row_format.needs)}" for name, row_format in formats.FORMATS.items())
