"""A first look at the data's files, before anything is built: the defects that `tunegate check` reports at once.

The readers are the data stage's own. Checks that need the base model's tokenizer (lengths, special tokens) or all rows
together (duplicates, leaks) are left to that stage. Sound files aren't read again until they, or the readers' code, change.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline import store
from pipeline.data.defects import Defect, DefectLog
from pipeline.data.sources import ConfigSource, is_hub_id, local_files, sources
from pipeline.digests import digest_of
from pipeline.errors import DataError, Problem
from pipeline.file_digests import remembered
from pipeline.files import write_json
from pipeline.plan import code

MOST = 8 * 2**20  # bytes that are read, all files together: about half a second
SETS = ("datasets", "test_datasets")  # by side, as the data stage numbers them; it alone reads benchmarks

DataFile = tuple[ConfigSource, int, Path]


def look(data: Mapping[str, Any]) -> str:
    """The result of a first look at the files of a data config (as JSON), in a line; missing files are passed over.

    Raises DataError with every defect, as the data stage would.
    """
    data_files: list[DataFile] = []
    unread = []
    for side, group in enumerate(SETS):
        for entry in sources(data, group):
            reason = _why_not(entry, side, data_files)
            unread += [f"{entry.source['path']} {reason}"] if reason else []
    parts = [f"{_rows(data, data_files)} rows read, without defects"] if data_files else []
    if unread:
        parts.append(f"not read: {', '.join(unread)}")
    return "; ".join(
        [*parts, "`tunegate run` looks at all of it first" if unread else "lengths and duplicates are seen by prepare"]
    )


def _why_not(entry: ConfigSource, side: int, data_files: list[DataFile]) -> str | None:
    """Add a source's files to `data_files`, or return the reason why they aren't read here."""
    path = entry.source["path"]
    if is_hub_id(path):
        return "is on the hub"
    files = local_files(Path(path), entry.suffixes)
    if isinstance(files, Defect):
        return None
    if any(file.suffix == ".parquet" for file in files):
        return "is Parquet"
    if sum(file.stat().st_size for file in (*files, *(file for _, _, file in data_files))) > MOST:
        return "is large"
    data_files += [(entry, side, file) for file in files]
    return None


def _rows(data: Mapping[str, Any], data_files: Sequence[DataFile]) -> int:
    """The number of rows in the files; raises DataError with their defects."""
    key = digest_of(
        {
            "files": [[str(file), remembered(file), side, entry.source] for entry, side, file in data_files],
            "rules": [data["columns"], data["max_defect_rate"], len(data["test_datasets"])],
            "code": code.source_digest("pipeline.data.reading"),
        }
    )
    memory = store.home() / "work" / "configs" / f"data-{key[:32]}.json"
    with suppress(OSError, ValueError):
        return int(json.loads(memory.read_text(encoding="utf-8")))
    rows = _read(data, data_files)
    with suppress(OSError):  # a store that can't be written costs time only
        memory.parent.mkdir(parents=True, exist_ok=True)
        write_json(memory, rows)
    return rows


def _read(data: Mapping[str, Any], data_files: Sequence[DataFile]) -> int:
    from pipeline.data.reading import RowReader, check_file  # here because sound files aren't read again

    nowhere = Path("/dev/null")
    with DefectLog(nowhere) as log:
        reader = RowReader(log, data)
        for entry, side, file in data_files:
            check_file(reader, entry.source, str(file), file, side)
        try:
            log.raise_if_too_many(data["max_defect_rate"])
        except DataError as error:
            raise DataError([_in_short(problem, nowhere) for problem in error.problems]) from None
        return log.rows


def _in_short(problem: Problem, nowhere: Path) -> Problem:
    """A problem without the file that lists all defects, which a look doesn't write."""
    if problem.file != str(nowhere):
        return problem
    remedy = "correct those above first" if problem.remedy == "read them there" else problem.remedy
    return replace(problem, file=None, remedy=remedy)
