"""Whether a set leaks into another: what is compared with what, what is listed, and what stops the run.

Equal rows are dropped before the splits are drawn, and rows of one prompt drawn together (`data/duplicates.py`,
`data/splits.py`). Here train, val and calibration are held against the holdout and against public benchmarks:

- a holdout row whose prompt is like a row's (Jaccard similarity of word 3-grams);
- a holdout row inside a longer row: at least INSIDE_SHARE of its prompt's 8-grams, templates apart, stand in the
  row's messages or text (`data/ngrams.py`). Its answer, of LONG_ANSWER words or more, is looked for likewise, but
  not in what an assistant says: that rows share an answer is no leak;
- a benchmark's document of which an n-gram stands in a row.

Not found: translations, paraphrases, a holdout question of fewer than eight words inside a longer message.
"""

from __future__ import annotations

import itertools
import json
import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from pipeline import program
from pipeline.data import duplicates
from pipeline.data import rows as data_rows
from pipeline.data.duplicates import Pair, Place
from pipeline.data.formats import Body, Message
from pipeline.data.ngrams import INSIDE, Index, Needle, Text, grams_of
from pipeline.errors import DataError, Problem

LISTS = {"near": "near_duplicates.jsonl", "inside": "inside.jsonl", "benchmark": "benchmark_overlap.jsonl"}
SHOWN = 20
INSIDE_SHARE = 0.8
LONG_ANSWER = 13
TRAINED_ON = "split IN ('train', 'val', 'calibration')"


@dataclass(frozen=True)
class Overlap:
    """A text found in a row: the share of its n-grams that are there, and the longest of them in folded words.

    `part` is a holdout row's prompt or answer, or a benchmark's document.
    """

    part: str
    share: float
    shared: str
    first: Place
    second: Place


def check(db: sqlite3.Connection, index: Index, data: Mapping[str, Any], extra: Path) -> dict[str, Any]:
    """Compare the sets, list what is found in `extra`, and return its counts and the first of each kind.

    Raises DataError naming both lines of the first of each kind, when there are more than the config allows.
    """
    db.execute("CREATE TABLE leaks (file TEXT, line INTEGER, PRIMARY KEY (file, line)) WITHOUT ROWID")
    lists = {name: extra / file for name, file in LISTS.items()}
    near = _near(db, data["near_duplicate_threshold"], lists["near"])
    program.message("looking for rows and benchmarks inside longer rows")
    index.add(_holdout(db))
    rows = data_rows.count(db, TRAINED_ON)
    index.search(_texts(db), rows, lambda done, total: program.progress(done, total, "rows searched"))
    inside = _inside(db, index, lists["inside"])
    benchmarks = _benchmarks(db, index, lists["benchmark"])
    holdout = data_rows.count(db, "split = 'holdout'")
    problems = [
        *_holdout_problems(near, inside, holdout, data, lists),
        *_benchmark_problems(benchmarks, data, lists["benchmark"]),
    ]
    if problems:
        raise DataError(problems)
    return {
        "near_duplicates": {**near, "first": [asdict(pair) for pair in near["first"]]},
        "inside": {**inside, "first": [asdict(overlap) for overlap in inside["first"]]},
        "benchmarks": {**benchmarks, "first": [asdict(overlap) for overlap in benchmarks["first"]]},
    }


def _near(db: sqlite3.Connection, threshold: float, listed: Path) -> dict[str, Any]:
    first: list[Pair] = []
    counts = {True: 0, False: 0}

    def report(done: int, total: int) -> None:
        program.progress(done, total, "rows compared")

    with listed.open("w", encoding="utf-8") as file:
        for pair in duplicates.find_near(db, threshold, report):
            _list(pair, file)
            counts[pair.leak] += 1
            if pair.leak:
                _is_new(db, pair.first)
                first += [pair] if len(first) < SHOWN else []
    return {
        "threshold": threshold,
        "holdout_near_train": counts[True],
        "within_train": counts[False],
        "first": first,
    }


def _inside(db: sqlite3.Connection, index: Index, listed: Path) -> dict[str, Any]:
    """Holdout rows inside a longer row that are near none; each counts once, by its prompt or its answer."""
    first: list[Overlap] = []
    count = 0
    with listed.open("w", encoding="utf-8") as file:
        for overlap in itertools.chain(_held(db, index, "prompt"), _held(db, index, "answer")):
            if _is_new(db, overlap.first):
                _list(overlap, file)
                count += 1
                first += [overlap] if len(first) < SHOWN else []
    return {"holdout_inside_train": count, "first": first}


def _held(db: sqlite3.Connection, index: Index, part: str) -> Iterator[Overlap]:
    """The prompts, or the answers, of which at least INSIDE_SHARE stands in a row."""
    by_answer = part == "answer"
    for needle, rows in index.candidates(part, shown=by_answer):
        (row,) = db.execute("SELECT row FROM needles WHERE n = ?", (needle,)).fetchone()
        messages = [text.text for text in row_texts(db, row)]
        texts = [data_rows.words(text) for text in (messages[-1:] if by_answer else messages[:-1])]
        shares = {
            other: index.share(part, texts, [text for text in row_texts(db, other) if text.shown or not by_answer])
            for other in rows
        }
        best = max(rows, key=lambda other: (shares[other], -other))
        if shares[best] >= INSIDE_SHARE:
            yield _overlap(db, index, part, needle, best, shares[best])


def _benchmarks(db: sqlite3.Connection, index: Index, listed: Path) -> dict[str, Any]:
    first: list[Overlap] = []
    count = 0
    with listed.open("w", encoding="utf-8") as file:
        for needle, rows in index.candidates("benchmark"):
            overlap = _overlap(db, index, "document", needle, rows[0], index.part(needle, rows[0]))
            _list(overlap, file)
            count += 1
            first += [overlap] if len(first) < SHOWN else []
    return {"documents": index.count("benchmark"), "overlapping": count, "first": first}


def _overlap(db: sqlite3.Connection, index: Index, part: str, needle: int, row: int, share: float) -> Overlap:
    query = "SELECT files.name, line, text FROM needles JOIN files ON files.n = needles.file WHERE needles.n = ?"
    name, line, text = db.execute(query, (needle,)).fetchone()
    found = Place(name, line, "benchmark" if part == "document" else "holdout", text)
    shared = index.shared(needle, row, row_texts(db, row))
    return Overlap(part, round(share, 4), shared, found, duplicates.place(db, row))


def _holdout(db: sqlite3.Connection) -> Iterator[Needle]:
    """The prompts of the holdout, and the answers that are long enough to tell a row."""
    query = "SELECT n, file, line, body FROM rows WHERE split = 'holdout' ORDER BY n"
    for n, file, line, text in db.execute(query):
        body: list[Message] = json.loads(text)
        *turns, answer = (data_rows.words(message["content"]) for message in body)
        shown = data_rows.prompt_text(body, system=False)
        yield Needle("prompt", file, line, shown, grams_of(turns, INSIDE), n)
        if len(answer) >= LONG_ANSWER:
            yield Needle("answer", file, line, body[-1]["content"], grams_of([answer], INSIDE), n)


def _texts(db: sqlite3.Connection) -> Iterator[Text]:
    """What is trained on, validated on and calibrated with, text by text."""
    reading = db.execute(f"SELECT n, body FROM rows WHERE {TRAINED_ON} ORDER BY n")  # noqa: S608 - a constant
    for n, body in reading:
        yield from _split(n, json.loads(body))


def row_texts(db: sqlite3.Connection, n: int) -> list[Text]:
    """A row's messages, or its text."""
    return _split(n, duplicates.body_of(db, n))


def _split(n: int, body: Body) -> list[Text]:
    if isinstance(body, str):
        return [Text(n, body, shown=True)]
    return [Text(n, message["content"], shown=message["role"] != "assistant") for message in body]


def _list(found: Pair | Overlap, file: TextIO) -> None:
    file.write(json.dumps(asdict(found), ensure_ascii=False) + "\n")


def _is_new(db: sqlite3.Connection, place: Place) -> bool:
    """Note a holdout row that leaks; whether it wasn't noted yet."""
    noted = db.execute("INSERT OR IGNORE INTO leaks VALUES (?, ?)", (place.file, place.line))
    return noted.rowcount == 1


def _holdout_problems(
    near: Mapping[str, Any], inside: Mapping[str, Any], holdout: int, data: Mapping[str, Any], lists: Mapping[str, Path]
) -> list[Problem]:
    """What is wrong when too large a part of the holdout is near another row or inside one."""
    alike, within, allowed = near["holdout_near_train"], inside["holdout_inside_train"], data["max_near_duplicate_rate"]
    if alike + within <= allowed * holdout:
        return []
    first = [_problem(found, "one of the two") for found in (*near["first"], *inside["first"])]
    rate = Problem(
        f"{alike + within} of {holdout} holdout rows ({(alike + within) / holdout:.1%}) leak: {alike} are"
        f" {near['threshold']:.0%} like another row, {within} stand inside one",
        file=" and ".join(str(lists[name]) for name, found in (("near", alike), ("inside", within)) if found),
        key="data.max_near_duplicate_rate",
        allowed=f"at most {allowed:.1%}",
        remedy="remove one row of each pair that is listed there, or raise data.max_near_duplicate_rate",
    )
    return [*first, rate]


def _benchmark_problems(found: Mapping[str, Any], data: Mapping[str, Any], listed: Path) -> list[Problem]:
    """What is wrong when too many of the benchmarks' documents stand in rows."""
    overlapping, documents, allowed = found["overlapping"], found["documents"], data["max_benchmark_overlap_rate"]
    if overlapping <= allowed * documents:
        return []
    rate = Problem(
        f"{overlapping} of {documents} benchmark documents ({overlapping / documents:.1%}) share"
        f" {data['benchmark_ngram']} words in a row, or all of a shorter text, with a row",
        file=str(listed),
        key="data.max_benchmark_overlap_rate",
        allowed=f"at most {allowed:.1%}",
        remedy="remove the second row of each pair in that list, or raise data.max_benchmark_overlap_rate",
    )
    return [*(_problem(overlap, "that row") for overlap in found["first"]), rate]


def _problem(found: Pair | Overlap, remove: str) -> Problem:
    row = f"the {found.second.split} row {found.second.file}:{found.second.line}"
    if isinstance(found, Pair):
        what = f"this holdout row is {found.similarity:.0%} like {row}"
    elif found.part == "document":
        what = f"a part of this benchmark document stands in {row}: “{found.shared}”"
    else:
        what = f"{found.share:.0%} of this holdout row's {found.part} stands in {row}: “{found.shared}”"
    return Problem(what, found.first.file, found.first.line, remedy=f"remove {remove}")
