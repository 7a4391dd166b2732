"""The data stage as the flow runs it: a child in the train environment, with a tiny Llama's tokenizer."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from support import programs
from support.data_samples import (
    as_alpaca,
    as_csv,
    as_json_list,
    as_parquet,
    as_prompt,
    as_sharegpt,
    conversation,
    payload,
    settings,
    write,
)
from support.defects import DEFECTS, TYPES

from pipeline import files
from pipeline.data import demo_tickets
from pipeline.data.splits import SPLITS
from pipeline.digests import digest_folder
from pipeline.errors import DataError

pytestmark = pytest.mark.slow

BROKEN = Path(__file__).parents[2] / "broken_data"
# File -> the line of its one defect, what is said about it, and what to do.


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The inputs of a prepare request: a tiny Llama with ChatML."""
    folder = tmp_path_factory.mktemp("base")
    programs.tiny(folder / "payload")
    return {"base": programs.artifact(folder, "base", {})}


@pytest.fixture(scope="module")
def refusals(base: dict, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The stage's answer to each broken file."""
    folder = tmp_path_factory.mktemp("broken")
    truncate = {"sequence_len": 128, "excess_length_strategy": "truncate"}
    configs = {
        name: settings(BROKEN / name, kind=TYPES.get(name, "auto"), **truncate)
        for name in (*DEFECTS, "five_mistakes.jsonl")
    }
    sound = write(folder / "sound.jsonl", [conversation(number) for number in range(5)])
    configs["text in holdout"] = settings(sound, test=(BROKEN / "text_only.jsonl",))
    configs["too long"] = settings(BROKEN / "answer_cut_off.jsonl", sequence_len=160, excess_length_strategy="raise")
    configs["two files"] = settings(BROKEN / "nan.jsonl", BROKEN / "not_there.jsonl", BROKEN / "ragged.csv")
    requests = [(folder / name, config, base) for name, config in configs.items()]
    return dict(zip(configs, programs.run_many("pipeline.data.prepare", requests, folder), strict=True))


@pytest.mark.parametrize("name", DEFECTS)
def test_a_broken_file_is_refused_with_file_line_and_remedy(refusals: dict, name: str) -> None:
    """Each broken file gives exactly one problem, at its line, with what to do."""
    line, what, remedy = DEFECTS[name]
    error = refusals[name]
    assert isinstance(error, DataError)
    (problem,) = error.problems
    assert (problem.file, problem.line) == (str(BROKEN / name), line)
    assert what in f"{problem.key}: {problem.what}"
    assert remedy in problem.remedy


def test_five_mistakes_are_named_in_one_run(refusals: dict) -> None:
    """All five defective rows of a file are named, in order, and the sound row between them is not."""
    assert [
        (problem.line, problem.what.split(" (column")[0]) for problem in refusals["five_mistakes.jsonl"].problems
    ] == [
        (1, "the answer is empty"),
        (2, "Expecting value"),
        (3, "the assistant speaks first"),
        (5, "the text holds the special token <|im_start|>"),
        (6, "the conversation does not end with the assistant"),
    ]


def test_every_file_of_the_config_is_judged_in_one_run(refusals: dict) -> None:
    """A missing file doesn't hide the defects of those before and after it."""
    places = [(Path(problem.file).name, problem.line) for problem in refusals["two files"].problems]
    assert places == [("not_there.jsonl", None), ("nan.jsonl", 4), ("ragged.csv", 3)]


def test_texts_without_an_answer_are_no_holdout(refusals: dict) -> None:
    """A text file among test_datasets is refused, because nothing in it can be scored."""
    (problem,) = refusals["text in holdout"].problems
    assert "can't be scored" in problem.what


def test_a_long_row_is_a_defect_when_the_config_says_so(refusals: dict) -> None:
    """excess_length_strategy: raise names the row, its tokens and the limit."""
    (problem,) = refusals["too long"].problems
    assert problem.line == 2
    assert problem.allowed == "sequence_len: 160"


@pytest.fixture(scope="module")
def prepared(base: dict, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Several sound configs prepared in one child: their folders, and details or errors."""
    folder = tmp_path_factory.mktemp("prepared")
    rows = [conversation(number) for number in range(300)]
    train = write(folder / "train.jsonl", rows)
    more = write(folder / "more.jsonl", [conversation(number) for number in range(300, 360)])
    copies = [
        conversation(0, "REFUND and invoice: where are they now, please?"),
        conversation(0, "Refund and invoice, where are they now please"),
        conversation(1, "Refund and invoice - where are they now, please?"),
    ]
    repeated = write(folder / "repeated.jsonl", [*rows[:40], rows[3], *copies])
    asked = "Tell me which of the two orders from last week was sent to the new address in the end"
    leaky = write(folder / "leaky.jsonl", [*rows[:40], conversation(1, asked + "?")])
    exam = write(
        folder / "exam.jsonl",
        [conversation(2, asked + " please?"), conversation(2, rows[5]["messages"][0]["content"].upper())],
    )
    bad = write(folder / "bad.jsonl", [*rows[:38], {"messages": []}, conversation(39, " ")])
    long = write(folder / "long.jsonl", [*rows[:20], conversation(1, "too long " * 200)])
    texts = write(
        folder / "texts.jsonl",
        [{"text": f"Text {n} about the {n * 13} invoices of {n * 7}."} for n in range(30)],
    )
    tickets = demo_tickets.write(folder / "tickets", 120, 30, 1)
    configs = {
        "plain": settings(train),
        "again": settings(train),
        "grown": settings(train, more),
        "counted": settings(train, holdout_size=20, val_set_size=10, calibration_set_size=5),
        "repeated": settings(repeated),
        "leaky": settings(leaky, test=(exam,)),
        "leaks allowed": settings(leaky, test=(exam,), max_near_duplicate_rate=1.0),
        "bad": settings(bad),
        "bad allowed": settings(bad, max_defect_rate=0.06),
        "too many bad": settings(bad, max_defect_rate=0.04),
        "long": settings(long, sequence_len=128),
        "long kept": settings(long, sequence_len=2048),
        "texts": settings(texts, test=(exam,)),
        "only holdout": settings(write(folder / "one.jsonl", rows[:3]), holdout_size=3),
        "only val": settings(write(folder / "three.jsonl", rows[100:103]), test=(exam,), val_set_size=24),
        "only the exam": settings(exam, test=(exam,)),
        "tickets": settings(tickets[0], test=(tickets[1],)),
    }  # fmt: skip
    template = {"user": "{question}", "assistant": "{label}"}
    few = [conversation(number) for number in range(60)]
    split_up = write(folder / "parts" / "b.jsonl", few[30:]).parent
    write(split_up / "a.jsonl", few[:30])
    configs |= {
        "as messages": settings(write(folder / "few.jsonl", few)),
        "as list": settings(as_json_list(folder / "few.json", few)),
        "as columns": settings(as_csv(folder / "few.csv", few), kind="columns", template=template),
        "as parquet": settings(as_parquet(folder / "few.parquet", few)),
        "as alpaca": settings(write(folder / "alpaca.jsonl", [as_alpaca(row) for row in few])),
        "as sharegpt": settings(write(folder / "sharegpt.jsonl", [as_sharegpt(row) for row in few])),
        "as prompts": settings(write(folder / "prompts.jsonl", [as_prompt(row) for row in few])),
        "as folder": settings(split_up),
    }
    told = [{**row, "channel": f"c{n % 3}", "stars": n % 5, "sent": n % 2 > 0} for n, row in enumerate(few)]
    columns = {"columns": ("channel", "stars", "sent")}
    asked = [{**as_alpaca(row), **{name: row[name] for name in columns["columns"]}} for row in told]
    unfit = {**few[2], "channel": None, "stars": [1], "sent": {}}
    amiss = write(folder / "amiss.jsonl", [*told[:2], unfit, few[3], {**told[5], "channel": "HALF"}])
    amiss.write_text(amiss.read_text().replace("HALF", "\\ud83d"))
    configs |= {
        "columns": settings(write(folder / "told.jsonl", told), **columns),
        "columns of parquet": settings(as_parquet(folder / "told.parquet", told), **columns),
        "columns of alpaca": settings(write(folder / "asked.jsonl", asked), **columns),
        "columns of csv": settings(folder / "few.csv", kind="columns", template=template, columns=("number", "label")),
        "columns of the holdout alone": settings(texts, test=(folder / "told.jsonl",), **columns),
        "columns amiss": settings(amiss, folder / "few.csv", kind="auto", **columns),
    }  # fmt: skip
    requests = [(folder / name, config, base) for name, config in configs.items()]
    details = programs.run_many("pipeline.data.prepare", requests, folder)
    return {name: (folder / name, detail) for name, detail in zip(configs, details, strict=True)}


def ids(prepared: dict, name: str) -> dict[str, set[str]]:
    return {split: {row["id"] for row in rows} for split, rows in payload(prepared[name][0]).items()}


def test_the_four_sets_are_disjoint_and_complete(prepared: dict) -> None:
    """Every row is in exactly one set, with the messages it was given, and the detail counts them."""
    sets, (folder, detail) = payload(prepared["plain"][0]), prepared["plain"]
    assert sum(map(len, sets.values())) == len(set.union(*ids(prepared, "plain").values())) == 300
    assert all(sets[split] for split in SPLITS)
    assert detail["rows"] == {split: len(rows) for split, rows in sets.items()}
    contents = {json.dumps(row["messages"], sort_keys=True) for rows in sets.values() for row in rows}
    assert contents == {json.dumps(conversation(number)["messages"], sort_keys=True) for number in range(300)}
    assert {path.name for path in (folder / "extra").iterdir()} >= {
        "report.md", "report.json", "token_lengths.png",
        "defects.jsonl", "dropped.jsonl", "near_duplicates.jsonl",
    }  # fmt: skip


def test_the_same_data_gives_the_same_bytes(prepared: dict) -> None:
    """Two runs of one config have payloads with one digest, and the record's digests are the files'."""
    assert digest_folder(prepared["plain"][0] / "payload") == digest_folder(prepared["again"][0] / "payload")
    assert prepared["plain"][1]["digests"] == prepared["again"][1]["digests"]


@pytest.mark.parametrize("form", ["list", "columns", "parquet", "alpaca", "sharegpt", "prompts", "folder"])
def test_every_format_gives_the_same_payload(prepared: dict, form: str) -> None:
    """The same conversations in another format or file are the same rows in the same sets, byte for byte."""
    assert prepared[f"as {form}"][1]["digests"] == prepared["as messages"][1]["digests"]


def test_rows_do_not_move_when_others_are_added(prepared: dict) -> None:
    """With shares, every old row stays in its set; calibration, a number of rows, may give some to train."""
    before, after = ids(prepared, "plain"), ids(prepared, "grown")
    assert before["holdout"] <= after["holdout"]
    assert before["val"] <= after["val"]
    assert before["train"] <= after["train"] | after["calibration"]
    assert len(after["holdout"]) > len(before["holdout"])


def test_sizes_above_one_are_numbers_of_rows(prepared: dict) -> None:
    """holdout_size, val_set_size and calibration_set_size are met exactly."""
    rows = prepared["counted"][1]["rows"]
    assert rows == {"holdout": 20, "val": 10, "calibration": 5, "train": 265}


def test_equal_rows_are_dropped_once_and_conflicts_reported(prepared: dict) -> None:
    """Rows equal after folding are dropped, their lines noted; a prompt's other answer stays."""
    folder, detail = prepared["repeated"]
    dropped = [json.loads(line) for line in (folder / "extra" / "dropped.jsonl").open()]
    assert [(row["line"], row["reason"]) for row in dropped] == [(41, "duplicate"), (43, "duplicate")]
    assert detail["dropped"] == {"duplicate": 2}
    assert detail["conflicting_prompts"] == 1
    assert sum(detail["rows"].values()) == 42


def test_training_rows_of_the_holdout_are_dropped_and_near_ones_stop_the_run(prepared: dict) -> None:
    """An equal row leaves train; a near one is named with both lines and stops the run above the rate."""
    folder, error = prepared["leaky"]
    assert isinstance(error, DataError)
    first, rate = error.problems
    assert (Path(first.file).name, first.line) == ("exam.jsonl", 1)
    assert first.what.endswith("leaky.jsonl:41")
    assert rate.key == "data.max_near_duplicate_rate"
    assert "1 of 2 holdout rows (50.0%)" in rate.what
    (pair,) = [pair for pair in map(json.loads, (folder / "extra" / "near_duplicates.jsonl").open()) if pair["leak"]]
    assert (pair["first"]["line"], pair["second"]["line"]) == (1, 41)


def test_allowed_near_duplicates_are_counted(prepared: dict) -> None:
    """Below the rate the run goes on, and the record counts equal and near rows apart."""
    _, detail = prepared["leaks allowed"]
    assert detail["near_duplicates"]["holdout_near_train"] == 1
    assert detail["dropped"] == {"in_holdout": 1}
    assert detail["rows"]["holdout"] == 2


def test_defective_rows_are_dropped_up_to_the_rate(prepared: dict) -> None:
    """Two of forty rows are dropped and counted at 6 %, refused at 4 % with the figure, and refused at 0."""
    assert prepared["bad allowed"][1]["dropped"] == {"defective": 2}
    assert sum(prepared["bad allowed"][1]["rows"].values()) == 38
    refused = prepared["too many bad"][1].problems
    assert [problem.line for problem in refused[:2]] == [39, 40]
    assert refused[2].what == "2 of 40 rows are defective (5.0%)"
    assert [problem.line for problem in prepared["bad"][1].problems] == [39, 40]
    listed = [json.loads(line) for line in (prepared["bad"][0] / "extra" / "defects.jsonl").open()]
    assert [(row["kind"], row["line"]) for row in listed] == [("not_text", 39), ("empty_message", 40)]


def test_rows_longer_than_the_sequence_are_left_out_and_counted(prepared: dict) -> None:
    """The default strategy drops a long row without calling it a defect; a longer sequence keeps it."""
    assert prepared["long"][1]["dropped"] == {"too_long": 1}
    assert prepared["long"][1]["defects"] == {}
    assert prepared["long kept"][1]["dropped"] == {}


def test_texts_are_trained_on_and_never_held_out(prepared: dict) -> None:
    """Rows of type text have an id and a text, and the holdout keeps its conversations."""
    sets = payload(prepared["texts"][0])
    assert {frozenset(row) for row in (*sets["train"], *sets["calibration"])} == {frozenset({"id", "text"})}
    assert all("messages" in row for row in sets["holdout"])


def test_a_set_without_rows_stops_the_run(prepared: dict) -> None:
    """When every row was held out, the error says so and which setting to change."""
    (problem,) = prepared["only holdout"][1].problems
    assert "train must have at least one row" in problem.what
    assert "data.holdout_size" in problem.remedy


def test_a_set_without_rows_names_its_file_and_where_they_went(prepared: dict) -> None:
    """The remedy fits: with a file as the holdout no size of it is to be lowered."""
    (problem,) = prepared["only val"][1].problems
    assert Path(problem.file).name == "three.jsonl"
    assert problem.what == "train must have at least one row; read were: 3 val"
    assert problem.remedy == "add rows, or lower data.val_set_size (24)"
    (problem,) = prepared["only the exam"][1].problems
    assert "dropped as in_holdout" in problem.what
    assert problem.remedy == "add rows, or take the holdout's rows out of the file"


def test_what_was_dropped_is_told_at_the_end_with_the_report(base: dict, tmp_path: Path) -> None:
    """In one line, with the place that the report has once the stage is done."""
    rows = [conversation(number) for number in range(60)]
    exam = write(tmp_path / "exam.jsonl", rows[50:])
    train = write(tmp_path / "train.jsonl", [*rows, *rows[:50]])
    _, events = programs.run(
        "pipeline.data.prepare", tmp_path / ".key.partial", settings(train, test=(exam,), val_set_size=5), base
    )
    assert [event["text"] for event in events if event["event"] == "message"][-1] == (
        "41 train, 5 val, 4 calibration, 10 holdout; dropped 50 duplicate, 10 in_holdout;"
        f" report {tmp_path}/key/extra/report.md"
    )


def test_the_demo_tickets_pass_and_their_report_shows_their_labels(prepared: dict) -> None:
    """The generated tickets have no defect and no leak; the report counts each category by set."""
    folder, detail = prepared["tickets"]
    assert detail["dropped"] == detail["defects"] == {}
    assert detail["near_duplicates"]["holdout_near_train"] == 0
    labels = json.loads((folder / "extra" / "report.json").read_text())["labels"]
    assert set(labels) == {"category", "priority", "product"}
    assert sum(splits.get("holdout", 0) for splits in labels["category"].values()) == 30
    assert (folder / "extra" / "answers.png").read_bytes().startswith(b"\x89PNG")
    assert "## Values of category" in (folder / "extra" / "report.md").read_text()


def test_a_holdout_row_keeps_its_columns_as_text(prepared: dict) -> None:
    """Strings as they are, numbers and booleans as JSON; rows, ids and sets are those without columns."""
    sets, plain = payload(prepared["columns"][0]), payload(prepared["as messages"][0])
    numbers = {json.dumps(conversation(n)["messages"], sort_keys=True): n for n in range(60)}
    assert sets["holdout"]
    for row in sets["holdout"]:
        number = numbers[json.dumps(row["messages"], sort_keys=True)]
        sent = "true" if number % 2 else "false"
        assert row.pop("columns") == {"channel": f"c{number % 3}", "stars": str(number % 5), "sent": sent}
    assert sets == plain


@pytest.mark.parametrize("form", ["parquet", "alpaca"])
def test_every_format_keeps_columns(prepared: dict, form: str) -> None:
    """The same rows with the same columns in another format are the same bytes."""
    assert prepared[f"columns of {form}"][1]["digests"] == prepared["columns"][1]["digests"]


def test_columns_of_a_table_may_be_part_of_the_conversation(prepared: dict) -> None:
    """A CSV's columns are text already; the answer's own can be kept, too, and none is called ignored."""
    folder, detail = prepared["columns of csv"]
    assert detail["digests"]["train"] == prepared["as columns"][1]["digests"]["train"]
    for row in payload(folder)["holdout"]:
        assert row["columns"].keys() == {"number", "label"}
        assert row["columns"]["label"] == row["messages"][-1]["content"]
    (file,) = json.loads((folder / "extra" / "report.json").read_text())["files"]
    assert file["ignored_columns"] == []


def test_only_what_may_be_held_out_needs_the_columns(prepared: dict) -> None:
    """Training rows beside test_datasets lack them without harm."""
    sets = payload(prepared["columns of the holdout alone"][0])
    assert all(row["columns"]["channel"] for row in sets["holdout"])
    assert not any("columns" in row for row in (*sets["train"], *sets["val"], *sets["calibration"]))


def test_a_column_that_is_missing_or_no_text_is_a_defect(prepared: dict) -> None:
    """Rows are named with line and column; a table that lacks columns is named once."""
    _, error = prepared["columns amiss"]
    assert isinstance(error, DataError)
    assert [(Path(problem.file).name, problem.line, problem.key, problem.what) for problem in error.problems] == [
        ("amiss.jsonl", 3, "channel", "is null, not text"),
        ("amiss.jsonl", 3, "stars", "is a list, not text"),
        ("amiss.jsonl", 3, "sent", "is an object, not text"),
        *(("amiss.jsonl", 4, name, "is missing") for name in ("channel", "stars", "sent")),
        ("amiss.jsonl", 5, "channel", "the text holds half a character, U+D83D"),
        ("few.csv", None, None, "has the columns number, question, label"),
        ("few.csv", 1, None, "lacks the column channel, stars, sent; its columns are number, question, label"),
    ]


# The tokenizer's threads would each keep freed memory of their own, by chance more or less.
ONE_ARENA = {"RAYON_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
MEASURE = """
import json, resource, sys
from pathlib import Path
from pipeline.data import prepare as data
from pipeline import program
raw = json.loads(Path(sys.argv[1]).read_text())
detail = data.run(program.Request(raw["config"], raw["inputs"], Path(raw["folder"])))
print(json.dumps([detail["rows_read"], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024]))
"""


def test_memory_does_not_grow_with_the_data(base: dict, tmp_path: Path) -> None:
    """Ten times the rows (45 MB against 4 MB of text) take at most 16 MB more."""
    peaks = {}
    draw = random.Random(3)
    words = (Path(programs.TESTS) / "support" / "tiny.py").read_text().split()
    for rows in (2000, 20000):
        file = tmp_path / f"{rows}.jsonl"
        with file.open("w", encoding="utf-8") as out:
            for number in range(rows):
                text = " ".join(draw.choices(words, k=30) * 8)
                row = conversation(number, f"{number} {text.replace('<|', '')}")
                out.write(json.dumps(row) + "\n")
        folder = tmp_path / str(rows)
        folder.mkdir()
        config = settings(file, sequence_len=65536)
        files.write_json(folder / "request.json", {"config": config, "inputs": base, "folder": str(folder)})
        measured = programs.python(MEASURE, folder / "request.json", **ONE_ARENA)
        read, peaks[rows] = json.loads(measured.splitlines()[-1])
        assert read == rows
    assert peaks[20000] < peaks[2000] + 16, peaks
