"""Planted leaks: each is one row in a file, and the same files without it pass."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import pytest
from support import programs
from support.data_samples import payload, settings, write

from pipeline.data import rows as data_rows
from pipeline.data import splits
from pipeline.errors import DataError

pytestmark = pytest.mark.slow

SYLLABLES = ("ba", "de", "ki", "lo", "mu", "na", "pe", "ri", "so", "tu", "va", "we")
WORDS = [first + second for first in SYLLABLES for second in SYLLABLES]
SYSTEM = "You help the customers of a small shop and answer every question in a short and friendly sentence."
CLEAN = 60


def sentence(seed: object, size: int = 20) -> str:
    return " ".join(random.Random(str(seed)).choices(WORDS, k=size))


def row(question: str, answer: str = "", *earlier: str) -> dict[str, Any]:
    """A conversation under the system message that all rows share; `earlier` are questions that came before."""
    turns = [turn for text in earlier for turn in (("user", text), ("assistant", sentence(("a", text), 5)))]
    turns = [("system", SYSTEM), *turns, ("user", question), ("assistant", answer or sentence(("a", question), 6))]
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


TRAIN = [row(sentence(("train", n))) for n in range(CLEAN)]
SHORT = "where is my parcel now"
LONG_ANSWER = sentence("long answer", 30)
EXAM = [*(row(sentence(("exam", n))) for n in range(9)), row(SHORT), row(sentence("asks", 12), LONG_ANSWER)]
ASKED = [conversation["messages"][1]["content"] for conversation in EXAM]
NEAR = " ".join([*ASKED[2].split()[:-1], "otherwise"])
INSIDE = f"{sentence('before', 25)}. {ASKED[3].capitalize()}? {sentence('after', 25)}"

QUESTION = sentence("question", 16)
CHOICES = [sentence(("choice", n), 3) for n in range(4)]
DOCUMENTS = [{"id": n, "question": sentence(("document", n), 16), "choices": CHOICES} for n in range(19)]
DOCUMENTS += [{"id": 19, "question": QUESTION, "choices": CHOICES}]
MIDDLE_SIZED = sentence("middle-sized", 9)
LITTLE = "who discovered penicillin"

# What is planted among the training rows -> the rows; "text" rows stand in a file of their own.
PLANTED: dict[str, list[dict[str, Any]]] = {
    "exactly": [row(ASKED[0])],
    "in another case and punctuation": [row(ASKED[1].upper().replace(" ", ", ") + "?!")],
    "near": [row(NEAR)],
    "inside a longer question": [row(INSIDE)],
    "inside a text": [{"text": INSIDE}],
    "in an earlier turn": [row(sentence("last", 10), "", ASKED[4])],
    "short, in an earlier turn": [row(sentence("last", 10), "", sentence("first", 10), SHORT.upper() + "?")],
    "its answer in a text": [{"text": f"{sentence('before')} {LONG_ANSWER} {sentence('after')}"}],
    "a short question in a sentence": [row(f"tell me {SHORT} and why {sentence('why', 10)}")],
    "its answer as another's answer": [row(sentence("asks too", 12), LONG_ANSWER)],
}
FOUND = {
    "near": (3, "this holdout row is 89% like the"),
    "inside a longer question": (4, "100% of this holdout row's prompt stands in the"),
    "inside a text": (4, "100% of this holdout row's prompt stands in the"),
    "in an earlier turn": (5, "100% of this holdout row's prompt stands in the"),
    "short, in an earlier turn": (10, "100% of this holdout row's prompt stands in the"),
    "its answer in a text": (11, "100% of this holdout row's answer stands in the"),
}
HARMLESS = ("clean", "a short question in a sentence", "its answer as another's answer")
BENCHMARKED = {
    "in a question": row(f"{sentence('b')} {QUESTION.upper()} {sentence('c')}"),
    "in an answer": row(sentence("d"), f"{sentence('e')} {QUESTION} {sentence('f')}"),
    "a part": row(f"{sentence('g')} {' '.join(QUESTION.split()[:13])} {sentence('h')}"),
    "too small a part": row(f"{sentence('i')} {' '.join(QUESTION.split()[:12])} {sentence('j')}"),
    "a choice": row(f"{sentence('k')} {CHOICES[1]} {sentence('l')}"),
}


def question_of(split: str, folder: Path) -> str:
    """The question of a training row that `settings` puts into that split."""
    db = data_rows.create(folder / "splits.sqlite")
    data_rows.add(db, [data_rows.SoundRow(0, 1, n, one["messages"], 9, 1) for n, one in enumerate(TRAIN, 1)], seed=7)
    splits.assign(db, holdout_size=1e-9, val_set_size=0.05, calibration_set_size=128)
    (body,) = db.execute("SELECT body FROM rows WHERE split = ?", (split,)).fetchone()
    return str(json.loads(body)[1]["content"])


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """Each plant, prepared in one child: its folder, and the detail or the error."""
    folder = tmp_path_factory.mktemp("leaks")
    programs.tiny(folder / "base" / "payload")
    base = {"base": programs.artifact(folder / "base", "base", {})}
    train, exam = write(folder / "train.jsonl", TRAIN), write(folder / "exam.jsonl", EXAM)
    strict = {"test": (exam,), "max_near_duplicate_rate": 0.0}
    configs = {"clean": settings(train, **strict)}
    for name, rows in PLANTED.items():
        configs[name] = settings(train, write(folder / f"{name}.jsonl", rows), **strict)
    configs["allowed"] = settings(train, folder / "near.jsonl", folder / "inside a text.jsonl",
                                  test=(exam,), max_near_duplicate_rate=0.2)  # fmt: skip
    taken = " ".join([*question_of("calibration", folder).split()[:-1], "otherwise"])
    near = write(folder / "near exam.jsonl", [*EXAM, row(taken)])
    configs["calibration"] = settings(train, test=(near,), max_near_duplicate_rate=0.0)
    benchmark = {"benchmarks": ({"path": str(write(folder / "benchmark.jsonl", DOCUMENTS))},)}
    configs["benchmark: clean"] = settings(train, test=(exam,), **benchmark)
    for name, one in BENCHMARKED.items():
        planted = write(folder / f"b {name}.jsonl", [one])
        configs[f"benchmark: {name}"] = settings(train, planted, test=(exam,), **benchmark)
    for split in ("train", "val", "calibration"):
        lines = folder / f"in {split}.txt"
        lines.write_text(f"{sentence('line')}\n{question_of(split, folder)}\n", encoding="utf-8")
        configs[f"benchmark: in {split}"] = settings(train, test=(exam,), benchmarks=({"path": str(lines)},))
    leaky = write(folder / "b all.jsonl", list(BENCHMARKED.values()))
    configs["benchmark: smaller n-grams"] = settings(train, leaky, test=(exam,), benchmark_ngram=8, **benchmark)
    configs["benchmark: allowed"] = settings(train, leaky, test=(exam,), max_benchmark_overlap_rate=0.05, **benchmark)
    configs["benchmark: of the holdout"] = settings(
        train, test=(write(folder / "b exam.jsonl", [*EXAM, row(QUESTION)]),), **benchmark
    )
    few = folder / "few"
    few.mkdir()
    (few / "lines.txt").write_text(f"{MIDDLE_SIZED}\n\n{LITTLE}\n", encoding="utf-8")
    with (few / "table.csv").open("w", encoding="utf-8", newline="") as out:
        csv.writer(out).writerows([["question", "source"], [sentence("of a table"), sentence("its source")]])
    configs["benchmark: of every format"] = settings(
        train,
        write(folder / "b few.jsonl", [
            row(f"{sentence('m')} {MIDDLE_SIZED.title()} {sentence('n')}"), row(f"{LITTLE}?"), row(sentence("of a table")),
        ]),
        test=(exam,), benchmarks=({"path": str(few)},),
    )  # fmt: skip
    configs["benchmark: its columns"] = settings(
        train, write(folder / "b source.jsonl", [row(sentence("its source"))]), test=(exam,),
        benchmarks=({"path": str(few / "table.csv"), "columns": ("question",)},),
    )  # fmt: skip
    broken = write(folder / "broken.jsonl", [{"question": "a"}, {"answer": "b"}])
    broken.write_text(broken.read_text() + "{\n")
    configs["benchmark: broken"] = settings(
        train, test=(exam,), max_defect_rate=1.0,
        benchmarks=(
            {"path": str(broken), "columns": ("question",)},
            {"path": str(few / "table.csv"), "columns": ("answer",)},
            {"path": str(folder / "nowhere.jsonl")},
        ),
    )  # fmt: skip
    requests = [(folder / "runs" / name, config, base) for name, config in configs.items()]
    (folder / "runs").mkdir()
    details = programs.run_many("pipeline.data.prepare", requests, folder)
    return {name: (folder / "runs" / name, detail) for name, detail in zip(configs, details, strict=True)}


def listed(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "extra" / f"{name}.jsonl").open(encoding="utf-8")]


@pytest.mark.parametrize("name", HARMLESS)
def test_what_leaks_nothing_passes_though_nothing_is_allowed(checked: dict, name: str) -> None:
    """The shared system message, five words in a sentence and an answer that two rows share are no leaks."""
    folder, detail = checked[name]
    assert detail["near_duplicates"]["holdout_near_train"] == detail["inside"]["holdout_inside_train"] == 0
    assert detail["dropped"] == {}
    assert listed(folder, "inside") == listed(folder, "benchmark_overlap") == []


@pytest.mark.parametrize("name", ["exactly", "in another case and punctuation"])
def test_an_equal_row_is_dropped_from_training(checked: dict, name: str) -> None:
    """The planted row is in no set, and counted."""
    folder, detail = checked[name]
    assert detail["dropped"] == {"in_holdout": 1}
    assert [Path(one["file"]).stem for one in listed(folder, "dropped")] == [name]
    assert sum(map(len, payload(folder).values())) == CLEAN + len(EXAM)


@pytest.mark.parametrize("name", FOUND)
def test_a_leak_stops_the_run_with_both_lines(checked: dict, name: str) -> None:
    """One problem names the holdout row and the planted row, one the rate and the setting; the list has both."""
    line, what = FOUND[name]
    folder, error = checked[name]
    assert isinstance(error, DataError)
    leak, rate = error.problems
    assert (Path(leak.file).name, leak.line) == ("exam.jsonl", line)
    assert leak.what.startswith(what)
    assert f"{name}.jsonl:1" in leak.what
    assert rate.key == "data.max_near_duplicate_rate"
    assert f"1 of {len(EXAM)} holdout rows" in rate.what
    (pair,) = [one for one in listed(folder, Path(rate.file).stem) if one.get("leak", True)]
    assert (pair["first"]["line"], Path(pair["second"]["file"]).stem, pair["second"]["line"]) == (line, name, 1)


def test_the_shared_words_are_told(checked: dict) -> None:
    """The error repeats an n-gram that both rows have."""
    leak, _ = checked["inside a text"][1].problems
    assert f"“{' '.join(ASKED[3].split()[:8])}”" in leak.what


def test_leaks_below_the_rate_are_counted_and_reported(checked: dict) -> None:
    """Two of eleven holdout rows may leak at 20 %: one near, one inside a text, both in the report."""
    folder, detail = checked["allowed"]
    assert detail["near_duplicates"]["holdout_near_train"] == 1
    assert detail["inside"] == {"holdout_inside_train": 1}
    report = (folder / "extra" / "report.md").read_text(encoding="utf-8")
    assert "Holdout rows inside a longer row of another set: 1." in report
    assert "inside a text.jsonl:1" in report


def test_a_holdout_row_in_calibration_is_found_as_such(checked: dict) -> None:
    """Calibration rows are compared with the holdout like training rows."""
    leak, _ = checked["calibration"][1].problems
    assert (Path(leak.file).name, leak.line) == ("near exam.jsonl", len(EXAM) + 1)
    assert "like the calibration row" in leak.what


@pytest.mark.parametrize("name", ["clean", "too small a part", "a choice", "of the holdout", "its columns"])
def test_a_benchmark_that_is_not_trained_on_passes(checked: dict, name: str) -> None:
    """Twelve words of a document, one that the holdout holds and columns that don't count are no overlap."""
    assert checked[f"benchmark: {name}"][1]["benchmarks"]["overlapping"] == 0


@pytest.mark.parametrize("name", ["in a question", "in an answer", "a part"])
def test_a_benchmark_document_in_training_stops_the_run(checked: dict, name: str) -> None:
    """Thirteen words in a row suffice, in prompt or answer; both lines are named, and the setting."""
    folder, error = checked[f"benchmark: {name}"]
    assert isinstance(error, DataError)
    leak, rate = error.problems
    assert (Path(leak.file).name, leak.line) == ("benchmark.jsonl", 20)
    assert f"b {name}.jsonl:1: “{' '.join(QUESTION.split()[:13])}”" in leak.what
    assert rate.key == "data.max_benchmark_overlap_rate"
    assert "1 of 20 benchmark documents (5.0%)" in rate.what
    (overlap,) = listed(folder, "benchmark_overlap")
    assert (overlap["part"], overlap["first"]["line"], overlap["second"]["line"]) == ("document", 20, 1)


@pytest.mark.parametrize("split", ["train", "val", "calibration"])
def test_a_benchmark_document_is_found_in_every_set_but_the_holdout(checked: dict, split: str) -> None:
    """The second line of the file is the question of a row of that set, and the error says of which."""
    leak, _ = checked[f"benchmark: in {split}"][1].problems
    assert (Path(leak.file).name, leak.line) == (f"in {split}.txt", 2)
    assert f"stands in the {split} row" in leak.what


def test_smaller_ngrams_find_smaller_parts(checked: dict) -> None:
    """With n-grams of eight words, twelve words in a row are an overlap; one document still counts once."""
    _, rate = checked["benchmark: smaller n-grams"][1].problems
    assert "1 of 20 benchmark documents (5.0%) share 8 words" in rate.what


def test_benchmark_overlaps_below_the_rate_are_counted_and_reported(checked: dict) -> None:
    """One document in twenty is allowed at 5 %; the record and the report count it."""
    folder, detail = checked["benchmark: allowed"]
    assert detail["benchmarks"] == {"documents": 20, "overlapping": 1, "too_short": 0}
    report = (folder / "extra" / "report.md").read_text(encoding="utf-8")
    assert "Documents found in train, val or calibration: 1 of 20." in report
    assert "benchmark.jsonl:20" in report


def test_documents_of_lines_and_tables_are_found_the_short_ones_too(checked: dict) -> None:
    """Nine words inside a question, three as all of one, and a CSV's row: each is found at its line."""
    folder, error = checked["benchmark: of every format"]
    assert isinstance(error, DataError)
    found = {
        (Path(one["first"]["file"]).name, one["first"]["line"]): one["second"]["line"]
        for one in listed(folder, "benchmark_overlap")
    }
    assert found == {("lines.txt", 1): 1, ("lines.txt", 3): 2, ("table.csv", 2): 3}


def test_a_benchmark_that_can_not_be_read_stops_the_run_at_any_defect_rate(checked: dict) -> None:
    """A broken line, a missing key or column and a missing file are all named, with line or key."""
    _, error = checked["benchmark: broken"]
    assert isinstance(error, DataError)
    told = {(Path(problem.file).name, problem.line, problem.key) for problem in error.problems}
    assert told == {
        ("broken.jsonl", 2, "data.benchmarks.columns"),
        ("broken.jsonl", 3, None),
        ("table.csv", 2, "data.benchmarks.columns"),
        ("nowhere.jsonl", None, "data.benchmarks.2.path"),
    }
