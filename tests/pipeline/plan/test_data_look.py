"""A first look at the data's files, as `tunegate check` takes it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support.defects import DEFECTS, TYPES
from support.ended import ended

from pipeline.config.schema import DataConfig
from pipeline.errors import DataError
from pipeline.plan import data_look

BROKEN = Path(__file__).parents[2] / "broken_data"
SOUND = '{"prompt": "one", "completion": "two"}\n'
# What only the base model's tokenizer tells, is left to pyarrow, or is told before anything is read.
LATER = {"special_token.jsonl", "answer_cut_off.jsonl", "cut_off.parquet", "not_parquet.parquet", "no_data", "not_there.jsonl",
         "notes.txt", "packed.jsonl.gz"}  # fmt: skip
SEEN = sorted(set(DEFECTS) - LATER)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("TUNEGATE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def config(*paths, test=(), kind="auto", **further):
    """A data config as JSON."""

    def named(files):
        return [{"path": str(file), "type": kind, "revision": "0" * 40} for file in files]

    found = {"datasets": named(paths), "test_datasets": named(test), **further}
    return DataConfig.model_validate(found).model_dump(mode="json")


def make(file, text=SOUND):
    file.write_text(text)
    return file


@pytest.mark.parametrize("name", SEEN)
def test_a_broken_file_is_told_as_the_data_stage_tells_it(name):
    """The same readers, so the same line, words and remedy."""
    line, what, remedy = DEFECTS[name]
    with pytest.raises(DataError) as caught:
        data_look.look(config(BROKEN / name, kind=TYPES.get(name, "auto")))
    (problem,) = caught.value.problems
    assert (problem.file, problem.line) == (str(BROKEN / name), line)
    assert what in f"{problem.key}: {problem.what}"
    assert remedy in str(problem.remedy)


def test_all_files_are_told_at_once_and_no_list_that_nobody_wrote(tmp_path):
    """Thirty defects of a kind are twenty and a number."""
    bad = make(tmp_path / "bad.jsonl", "{\n" * 30)
    with pytest.raises(DataError) as caught:
        data_look.look(config(bad, test=(BROKEN / "nan.jsonl",)))
    problems = caught.value.problems
    assert {problem.file for problem in problems} == {str(bad), str(BROKEN / "nan.jsonl"), None}
    assert (problems[-1].what, problems[-1].remedy) == (
        "10 more defects of the kind broken_json",
        "correct those above first",
    )


def test_defects_that_the_config_lets_pass_are_none(tmp_path):
    """As the data stage would have it."""
    file = make(tmp_path / "rows.jsonl", SOUND * 9 + "{\n")
    assert data_look.look(config(file, max_defect_rate=0.1)).startswith("10 rows read")
    with pytest.raises(DataError, match="1 of 10 rows are defective"):
        data_look.look(config(file, max_defect_rate=0.05))


def test_what_is_not_read_is_said(tmp_path, monkeypatch):
    """The hub's, Parquet, and what would take long; a file that isn't there is told elsewhere."""
    rows, table = make(tmp_path / "rows.jsonl"), make(tmp_path / "rows.parquet", "PAR1")
    said = data_look.look(config(rows, table, "owner/rows", tmp_path / "missing.jsonl"))
    assert said == (
        f"1 rows read, without defects; not read: {table} is Parquet, owner/rows is on the hub;"
        " `tunegate run` looks at all of it first"
    )
    monkeypatch.setattr(data_look, "MOST", 10)
    assert data_look.look(config(rows)) == f"not read: {rows} is large; `tunegate run` looks at all of it first"


def test_what_was_found_sound_is_read_again_when_it_or_the_rules_change(tmp_path, monkeypatch):
    """And only then."""
    read = []
    looked = data_look._read
    monkeypatch.setattr(data_look, "_read", lambda data, found: read.append(1) or looked(data, found))
    file = make(tmp_path / "rows.jsonl")
    for count, text, further in (
        (1, SOUND, {}),
        (1, SOUND, {}),
        (2, SOUND * 2, {}),
        (3, SOUND * 2, {"max_defect_rate": 0.5}),
    ):
        make(file, text)
        data_look.look(config(file, **further))
        assert len(read) == count
    with pytest.raises(DataError):
        data_look.look(config(file, columns=("language",)))


def test_check_finds_broken_data_and_says_what_it_read(tmp_path, capsys):
    """So does the plan of a run."""
    use = tmp_path / "use.yaml"
    use.write_text("datasets:\n  - path: rows.jsonl\ngate: {metrics: [{metric: exact_match, min: 0.5}]}\n")
    make(tmp_path / "rows.jsonl", SOUND + "{\n")
    for command in (("check", str(use)), ("run", str(use), "--dry-run")):
        assert ended(*command) == 2
        assert f"{tmp_path}/rows.jsonl:2: Expecting property name" in capsys.readouterr().err
    make(tmp_path / "rows.jsonl")
    assert ended("check", str(use)) == 0
    assert (
        "  data    1 rows read, without defects; lengths and duplicates are seen by prepare" in capsys.readouterr().out
    )


def test_a_look_at_what_is_known_imports_no_reader():
    """`tunegate check` answers at once."""
    code = "import sys, flows.commands.check, pipeline.plan.data_look; print(sorted({'csv', 'sqlite3', 'pydantic'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[3])
    assert done.stdout.strip() == "[]", done.stderr
