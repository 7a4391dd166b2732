"""Defects of data: each kind with its remedy, and the log that all of them go to.

The log writes every defect to a JSON Lines file at once and keeps the first SHOWN of each kind in memory.
A file with a million defects costs as much memory as one with twenty. Standard library only.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from pipeline.errors import DataError, Problem

SHOWN = 20


@dataclass(frozen=True)
class Kind:
    """A kind of defect: what to do about it, and whether it stops the run whatever `max_defect_rate` is."""

    remedy: str
    stops: bool = False


KINDS: dict[str, Kind] = {
    # a file
    "missing_file": Kind("correct the path, or name the folder it is relative to with --data-dir", stops=True),
    "unreadable_file": Kind("give yourself read access: chmod u+r {file}", stops=True),
    "no_data_files": Kind("put .jsonl, .json, .csv or .parquet files there, or name a file", stops=True),
    "unsupported_file": Kind("convert it to .jsonl, .json, .csv or .parquet", stops=True),
    "compressed_file": Kind("unpack it first (gunzip, unzip, unxz, unzstd) and name the unpacked file", stops=True),
    "empty_file": Kind("export the data again, or take the file out of the config", stops=True),
    "bom": Kind(r"remove the mark: sed -i '1s/^\xEF\xBB\xBF//' {file}", stops=True),
    "utf16": Kind("convert it: iconv -f UTF-16 -t UTF-8 {file} > {file}.utf8", stops=True),
    "not_a_list": Kind("write the rows as a list [{{…}}, …] or one object a line (jq -c '.KEY[]')", stops=True),
    "unclosed": Kind("export the file again; the download or the program that wrote it stopped halfway", stops=True),
    "row_too_big": Kind("check for a missing quote or line end; a row may have 16 MiB", stops=True),
    "no_header": Kind("add a first line that names the columns", stops=True),
    "duplicate_column": Kind("rename or remove one of the two columns", stops=True),
    "missing_column": Kind("add the column, or change type or template in the config", stops=True),
    "missing_further_column": Kind("add the column, or take its name out of data.columns", stops=True),
    "missing_benchmark_column": Kind("name columns that are there, or none to compare all texts", stops=True),
    "unknown_format": Kind("name the type in the config, or use type: columns with a template", stops=True),
    "not_parquet": Kind("export or download the file again", stops=True),
    "text_in_holdout": Kind("use rows with a question and an answer for the holdout", stops=True),
    "not_fetched": Kind("get the files and name their folder", stops=True),
    # a row
    "bad_utf8": Kind("convert the file: iconv -f WINDOWS-1252 -t UTF-8 {file} > {file}.utf8"),
    "broken_json": Kind("correct the line, or write the file with a JSON library"),
    "duplicate_key": Kind("keep one of the two values"),
    "nan": Kind("write null or leave the key out; JSON doesn't know NaN and Infinity"),
    "not_an_object": Kind('write each row as one object, such as {{"messages": […]}}'),
    "ragged_row": Kind("put fields that hold commas, quotes or line ends in double quotes"),
    "bad_quotes": Kind('double each quote inside a quoted field: ""like this""'),
    "mixed_format": Kind("put rows of different formats in different files"),
    "missing_field": Kind("add the key, or remove the row"),
    "not_text": Kind("write the value as a string; pictures, tools and nested values can't be trained on"),
    "missing_role": Kind("give every message a role and a content"),
    "unknown_role": Kind("rename the role, or remove the message"),
    "system_in_middle": Kind("move the system message to the beginning, or remove it"),
    "wrong_role_order": Kind("join neighbouring messages of one role; user and assistant take turns, user first"),
    "no_answer": Kind("end the conversation with the assistant's answer, or remove the row"),
    "empty_answer": Kind("write the answer, or remove the row"),
    "empty_message": Kind("write the content, or remove the row"),
    "special_token": Kind("remove it or put a space into it; inside a text it would end or forge a message"),
    "control_character": Kind(r"remove it: tr -d '\000-\010\013\014\016-\037\177' < {file} > {file}.clean"),
    "lone_surrogate": Kind("write the character whole; half of a \\ud83d\\ude00 pair can't be encoded"),
    "template_refused": Kind("shape the conversation as the base model's chat template wants it"),
    "answer_cut_off": Kind("shorten the prompt, or raise data.sequence_len"),
    "too_long": Kind("shorten the row, raise data.sequence_len, or set data.excess_length_strategy: drop"),
}


@dataclass(frozen=True)
class Defect:
    """One defect: its kind, a description (`what`), the line (1-based; in Parquet the row) and the column or key."""

    kind: str
    what: str
    line: int | None = None
    key: str | None = None
    allowed: str | None = None

    def problem(self, file: str) -> Problem:
        """The defect as an error's problem, with its remedy."""
        remedy = KINDS[self.kind].remedy.format(file=file)
        return Problem(self.what, file=file, line=self.line, key=self.key, allowed=self.allowed, remedy=remedy)


class DefectLog:
    """All defects of a run: counted, written to `path` as JSON Lines, the first of each kind in memory."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.rows = 0
        self.defective_rows = 0
        self.counts: Counter[str] = Counter()
        self._stops = False
        self._first: list[Problem] = []
        self._files: dict[str, int] = {}
        self._file = path.open("w", encoding="utf-8")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, file: str, defect: Defect, *, stops: bool = False) -> None:
        """Note one defect of `file`; with `stops` it stops the run even if its kind doesn't."""
        self._stops |= stops
        self.add_problem(defect.kind, defect.problem(file))

    def add_problem(self, kind: str, problem: Problem) -> None:
        """Note a defect that brings its own remedy."""
        self._files.setdefault(str(problem.file), len(self._files))
        self.counts[kind] += 1
        if self.counts[kind] <= SHOWN:
            self._first.append(problem)
        self._file.write(json.dumps({"kind": kind, **asdict(problem)}) + "\n")

    def add_row(self, file: str, defects: list[Defect]) -> None:
        """Note one row of `file`; a row without `defects` is sound."""
        self.rows += 1
        self.defective_rows += bool(defects)
        for defect in defects:
            self.add(file, defect)

    def raise_if_too_many(self, max_defect_rate: float) -> None:
        """Raise DataError when a defect stops the run or the share of defective rows is too high."""
        self._file.flush()
        stopping = self._stops or any(KINDS[kind].stops for kind in self.counts)
        if not stopping and self.defective_rows <= max_defect_rate * self.rows:
            return
        more = [
            Problem(
                f"{count - SHOWN} more defects of the kind {kind}",
                file=str(self.path),
                remedy="read them there",
            )
            for kind, count in sorted(self.counts.items())
            if count > SHOWN
        ]
        first = sorted(self._first, key=lambda problem: (self._files[str(problem.file)], problem.line or 0))
        raise DataError([*first, *more, *self._rate(stopping, max_defect_rate)])

    def _rate(self, stopping: bool, max_defect_rate: float) -> list[Problem]:
        if stopping or not max_defect_rate:
            return []
        share = self.defective_rows / self.rows
        return [
            Problem(
                f"{self.defective_rows} of {self.rows} rows are defective ({share:.1%})",
                file=str(self.path),
                key="data.max_defect_rate",
                allowed=f"at most {max_defect_rate:.1%}",
                remedy="correct the rows, or raise data.max_defect_rate",
            )
        ]
