"""The data's files read for what is wrong with them before anything is built: what `tunegate check` can say at once.

The readers are the data stage's own; what needs the base model's tokenizer (lengths, special tokens) or all rows together
(duplicates, leaks) is left to it. What was found sound isn't read again until it, or the readers' code, changes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline import store
from pipeline.data.defects import Defect, Ledger
from pipeline.data.sources import Named, is_hub_id, local_files, sources
from pipeline.digests import digest_of
from pipeline.errors import DataError, Problem
from pipeline.file_digests import remembered
from pipeline.files import write_json
from pipeline.plan import code

MOST = 8 * 2**20  # bytes that are read, all files together: about half a second
SETS = ("datasets", "test_datasets")  # by side, as the data stage numbers them; benchmarks are its affair

Found = tuple[Named, int, Path]


def look(data: Mapping[str, Any]) -> str:
    """What a first look at the files of a data config (as JSON) found, in a line; files that aren't there are passed over.

    Raises DataError with every defect, as the data stage would.
    """
    found: list[Found] = []
    unread = []
    for side, group in enumerate(SETS):
        for named in sources(data, group):
            reason = _why_not(named, side, found)
            unread += [f"{named.source['path']} {reason}"] if reason else []
    told = [f"{_rows(data, found)} rows read, without defects"] if found else []
    if unread:
        told.append(f"not read: {', '.join(unread)}")
    return "; ".join(
        [*told, "`tunegate run` looks at all of it first" if unread else "lengths and duplicates are seen by prepare"]
    )


def _why_not(named: Named, side: int, found: list[Found]) -> str | None:
    """Add a source's files to `found`, or say why they aren't read here."""
    path = named.source["path"]
    if is_hub_id(path):
        return "is on the hub"
    files = local_files(Path(path), named.suffixes)
    if isinstance(files, Defect):
        return None
    if any(file.suffix == ".parquet" for file in files):
        return "is Parquet"
    if sum(file.stat().st_size for file in (*files, *(file for _, _, file in found))) > MOST:
        return "is large"
    found += [(named, side, file) for file in files]
    return None


def _rows(data: Mapping[str, Any], found: Sequence[Found]) -> int:
    """How many rows the files have; raises DataError with what is wrong with them."""
    key = digest_of(
        {
            "files": [[str(file), remembered(file), side, named.source] for named, side, file in found],
            "rules": [data["columns"], data["max_defect_rate"], len(data["test_datasets"])],
            "code": code.source_digest("pipeline.data.reading"),
        }
    )
    memory = store.home() / "work" / "configs" / f"data-{key[:32]}.json"
    with suppress(OSError, ValueError):
        return int(json.loads(memory.read_text(encoding="utf-8")))
    rows = _read(data, found)
    with suppress(OSError):  # a store that can't be written costs time only
        memory.parent.mkdir(parents=True, exist_ok=True)
        write_json(memory, rows)
    return rows


def _read(data: Mapping[str, Any], found: Sequence[Found]) -> int:
    from pipeline.data.reading import Look  # here because what was found sound isn't read again

    nowhere = Path("/dev/null")
    with Ledger(nowhere) as ledger:
        for named, side, file in found:
            Look(ledger, data).read(named.source, str(file), file, side)
        try:
            ledger.judge(data["max_defect_rate"])
        except DataError as error:
            raise DataError([_in_short(problem, nowhere) for problem in error.problems]) from None
        return ledger.rows


def _in_short(problem: Problem, nowhere: Path) -> Problem:
    """A problem that names the list of all defects, which a look doesn't write."""
    if problem.file != str(nowhere):
        return problem
    remedy = "correct those above first" if problem.remedy == "read them there" else problem.remedy
    return replace(problem, file=None, remedy=remedy)
