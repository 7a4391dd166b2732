"""Whether a set leaks into another: which texts are compared, what is listed, and what stops the run.

Equal rows are dropped before the splits are drawn, and rows of one prompt are drawn together (`data/duplicates.py`,
`data/splits.py`). This module compares train, val and calibration with the holdout and with public benchmarks. It finds

- a holdout row whose prompt is like a row's: Jaccard similarity of word 3-grams;
- a holdout row inside a longer row: at least INSIDE_SHARE of its prompt's 8-grams, templates apart, are in the row's
  messages or text (`data/ngrams.py`). An answer of LONG_ANSWER words or more is looked for likewise, but not in
  assistant messages: two rows may share an answer;
- a benchmark's document that shares an n-gram with a row.

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
    """A text inside a row: the share of its n-grams that the row has, and the longest of these in folded words.

    `part` is the prompt or the answer of a holdout row, or a document of a benchmark.
    """

    part: str
    share: float
    shared: str
    first: Place
    second: Place


def check(db: sqlite3.Connection, index: Index, data: Mapping[str, Any], extra: Path) -> dict[str, Any]:
    """Compare the sets, list every leak in `extra`, and return the counts and the first leaks of each kind.

    Raises DataError naming both lines of the first of each kind, when there are more than the config allows.
    """
    db.execute("CREATE TABLE leaks (file TEXT, line INTEGER, PRIMARY KEY (file, line)) WITHOUT ROWID")
    lists = {name: extra / file for name, file in LISTS.items()}
    near = _near(db, data["near_duplicate_threshold"], lists["near"])
    program.message("looking for rows and benchmarks inside longer rows")
    index.add(_holdout(db))
    rows = data_rows.count(db, TRAINED_ON)
    index.search(_texts(db), rows, lambda rows_so_far, total: program.progress(rows_so_far, total, "rows searched"))
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


def _near(db: sqlite3.Connection, threshold: float, list_file: Path) -> dict[str, Any]:
    first: list[Pair] = []
    counts = {True: 0, False: 0}

    def report(rows_so_far: int, total: int) -> None:
        program.progress(rows_so_far, total, "rows compared")

    with list_file.open("w", encoding="utf-8") as file:
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


def _inside(db: sqlite3.Connection, index: Index, list_file: Path) -> dict[str, Any]:
    """Holdout rows inside a longer row, without those near a row; each counts once, by its prompt or its answer."""
    first: list[Overlap] = []
    count = 0
    with list_file.open("w", encoding="utf-8") as file:
        for overlap in itertools.chain(_holdout_parts(db, index, "prompt"), _holdout_parts(db, index, "answer")):
            if _is_new(db, overlap.first):
                _list(overlap, file)
                count += 1
                first += [overlap] if len(first) < SHOWN else []
    return {"holdout_inside_train": count, "first": first}


def _holdout_parts(db: sqlite3.Connection, index: Index, part: str) -> Iterator[Overlap]:
    """The holdout's prompts, or answers, of which a row has at least INSIDE_SHARE."""
    by_answer = part == "answer"
    for needle, rows in index.candidates(part, prompts_only=by_answer):
        (holdout_row,) = db.execute("SELECT row FROM needles WHERE n = ?", (needle,)).fetchone()
        messages = [text.text for text in row_texts(db, holdout_row)]
        texts = [data_rows.words(text) for text in (messages[-1:] if by_answer else messages[:-1])]
        shares = {
            row: index.share(part, texts, [text for text in row_texts(db, row) if text.is_prompt or not by_answer])
            for row in rows
        }
        best = max(sorted(rows), key=shares.__getitem__)  # of equal shares the first row
        if shares[best] >= INSIDE_SHARE:
            yield _overlap(db, index, part, needle, best, shares[best])


def _benchmarks(db: sqlite3.Connection, index: Index, list_file: Path) -> dict[str, Any]:
    first: list[Overlap] = []
    count = 0
    with list_file.open("w", encoding="utf-8") as file:
        for needle, rows in index.candidates("benchmark"):
            overlap = _overlap(db, index, "document", needle, rows[0], index.share_of_counting(needle, rows[0]))
            _list(overlap, file)
            count += 1
            first += [overlap] if len(first) < SHOWN else []
    return {"documents": index.count("benchmark"), "overlapping": count, "first": first}


def _overlap(db: sqlite3.Connection, index: Index, part: str, needle: int, row: int, share: float) -> Overlap:
    query = "SELECT files.name, line, text FROM needles JOIN files ON files.n = needles.file WHERE needles.n = ?"
    name, line, text = db.execute(query, (needle,)).fetchone()
    needle_place = Place(name, line, "benchmark" if part == "document" else "holdout", text)
    longest = index.longest_in_common(needle, row, row_texts(db, row))
    return Overlap(part, round(share, 4), longest, needle_place, duplicates.place(db, row))


def _holdout(db: sqlite3.Connection) -> Iterator[Needle]:
    """The prompts of the holdout, and the answers of at least LONG_ANSWER words."""
    query = "SELECT n, file, line, body FROM rows WHERE split = 'holdout' ORDER BY n"
    for n, file, line, text in db.execute(query):
        body: list[Message] = json.loads(text)
        *turns, answer = (data_rows.words(message["content"]) for message in body)
        prompt = data_rows.prompt_text(body, system=False)
        yield Needle("prompt", file, line, prompt, grams_of(turns, INSIDE), n)
        if len(answer) >= LONG_ANSWER:
            yield Needle("answer", file, line, body[-1]["content"], grams_of([answer], INSIDE), n)


def _texts(db: sqlite3.Connection) -> Iterator[Text]:
    """The texts of train, val and calibration."""
    cursor = db.execute(f"SELECT n, body FROM rows WHERE {TRAINED_ON} ORDER BY n")  # noqa: S608 - a constant
    for n, body in cursor:
        yield from _split(n, json.loads(body))


def row_texts(db: sqlite3.Connection, n: int) -> list[Text]:
    """A row's messages, or its text."""
    return _split(n, duplicates.body_of(db, n))


def _split(n: int, body: Body) -> list[Text]:
    if isinstance(body, str):
        return [Text(n, body, is_prompt=True)]
    return [Text(n, message["content"], is_prompt=message["role"] != "assistant") for message in body]


def _list(leak: Pair | Overlap, file: TextIO) -> None:
    file.write(json.dumps(asdict(leak), ensure_ascii=False) + "\n")


def _is_new(db: sqlite3.Connection, place: Place) -> bool:
    """Note a holdout row that leaks; returns False for one that was noted before."""
    cursor = db.execute("INSERT OR IGNORE INTO leaks VALUES (?, ?)", (place.file, place.line))
    return cursor.rowcount == 1


def _holdout_problems(
    near: Mapping[str, Any], inside: Mapping[str, Any], holdout: int, data: Mapping[str, Any], lists: Mapping[str, Path]
) -> list[Problem]:
    """The problems when too large a share of the holdout is near another row or inside one."""
    alike, within, max_rate = (
        near["holdout_near_train"],
        inside["holdout_inside_train"],
        data["max_near_duplicate_rate"],
    )
    if alike + within <= max_rate * holdout:
        return []
    first = [_problem(leak, "one of the two") for leak in (*near["first"], *inside["first"])]
    rate = Problem(
        f"{alike + within} of {holdout} holdout rows ({(alike + within) / holdout:.1%}) leak: {alike} are"
        f" {near['threshold']:.0%} like another row, {within} stand inside one",
        file=" and ".join(str(lists[name]) for name, count in (("near", alike), ("inside", within)) if count),
        key="data.max_near_duplicate_rate",
        allowed=f"at most {max_rate:.1%}",
        remedy="remove one row of each pair that is listed there, or raise data.max_near_duplicate_rate",
    )
    return [*first, rate]


def _benchmark_problems(benchmarks: Mapping[str, Any], data: Mapping[str, Any], list_file: Path) -> list[Problem]:
    """The problems when too large a share of the benchmarks' documents is in rows."""
    overlapping, documents = benchmarks["overlapping"], benchmarks["documents"]
    max_rate = data["max_benchmark_overlap_rate"]
    if overlapping <= max_rate * documents:
        return []
    rate = Problem(
        f"{overlapping} of {documents} benchmark documents ({overlapping / documents:.1%}) share"
        f" {data['benchmark_ngram']} words in a row, or all of a shorter text, with a row",
        file=str(list_file),
        key="data.max_benchmark_overlap_rate",
        allowed=f"at most {max_rate:.1%}",
        remedy="remove the second row of each pair in that list, or raise data.max_benchmark_overlap_rate",
    )
    return [*(_problem(overlap, "that row") for overlap in benchmarks["first"]), rate]


def _problem(leak: Pair | Overlap, remove: str) -> Problem:
    row = f"the {leak.second.split} row {leak.second.file}:{leak.second.line}"
    if isinstance(leak, Pair):
        text = f"this holdout row is {leak.similarity:.0%} like {row}"
    elif leak.part == "document":
        text = f"a part of this benchmark document stands in {row}: “{leak.shared}”"
    else:
        text = f"{leak.share:.0%} of this holdout row's {leak.part} stands in {row}: “{leak.shared}”"
    return Problem(text, leak.first.file, leak.first.line, remedy=f"remove {remove}")
