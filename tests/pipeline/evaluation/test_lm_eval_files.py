"""Task files of a user's own: what is refused, what is digested, and names against a folder laid out like lm-eval's."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config.file import load
from pipeline.environments.interpreters import Environment
from pipeline.errors import ConfigError
from pipeline.evaluation import lm_eval_files

GOOD = """\
task: mine
dataset_path: json
dataset_kwargs: {data_files: {test: test.jsonl}}
output_type: generate_until
test_split: test
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
"""


@pytest.fixture
def file(tmp_path):
    """Writes a task file with data beside it."""
    (tmp_path / "test.jsonl").write_text('{"question": "q", "answer": "a"}\n')

    def write(text, name="mine.yaml"):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def refused(path: Path) -> list[str]:
    """What is said of a task at that path."""
    with pytest.raises(ConfigError) as caught:
        lm_eval_files.read(path)
    return [str(problem) for problem in caught.value.problems]


def test_a_task_is_its_file_and_its_data(file, tmp_path):
    """Both decide its results, so both are in its digest; a file beside them isn't."""
    path = file(GOOD)
    (found,) = lm_eval_files.read(path)
    assert found.settings["task"] == "mine"
    assert found.files == (path, tmp_path / "test.jsonl")
    first = lm_eval_files.digest(str(path))
    (tmp_path / "other.jsonl").write_text("{}\n")
    assert lm_eval_files.digest(str(path)) == first
    (tmp_path / "test.jsonl").write_text('{"question": "q", "answer": "b"}\n')
    second = lm_eval_files.digest(str(path))
    file(GOOD + "num_fewshot: 2\n")
    assert len({first, second, lm_eval_files.digest(str(path))}) == 3


def test_an_included_file_counts_like_the_tasks_own(file):
    """Its settings lie below the task's, and its digest is the task's business."""
    base = file(GOOD.replace("task: mine\n", ""), "_base")
    path = file("include: _base\ntask: derived\noutput_type: multiple_choice\n")
    (found,) = lm_eval_files.read(path)
    assert (found.settings["task"], found.settings["output_type"]) == ("derived", "multiple_choice")
    assert base in found.files
    before = lm_eval_files.digest(str(path))
    file(GOOD.replace("task: mine\n", "description: more\n"), "_base")
    assert lm_eval_files.digest(str(path)) != before


def test_a_folder_is_all_its_task_files(file, tmp_path):
    """A template without a task is none of them."""
    file(GOOD)
    file(GOOD.replace("task: mine", "task: yours"), "yours.yml")
    file("output_type: generate_until\n", "_template.yaml")
    assert [task.settings["task"] for task in lm_eval_files.read(tmp_path)] == ["mine", "yours"]


def test_code_is_refused_with_its_line(file):
    """!function, in the task or in what it includes, and every other tag that YAML could make an object of."""
    file("doc_to_text: !function utils.text\n", "_base")
    said = refused(file(GOOD + "include: _base\nprocess_docs: !function utils.docs\nx: !!python/name:os.system ''\n"))
    assert len(said) == 3
    assert said[0].split(": ", 1)[0].endswith("mine.yaml:9")
    assert "!function utils.docs runs code" in said[0]
    assert "python/name:os.system" in said[1]
    assert "_base:1: !function utils.text runs code" in said[2]
    assert all("use a task that comes with lm-eval" in each for each in said)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("task: mine", "unsafe_code: true\ntask: mine", "unsafe_code: runs code from elsewhere"),
        ("{data_files", "{trust_remote_code: true, data_files", "trust_remote_code: runs code"),
        ("test_split", "metric_list: [{metric: x, hf_evaluate: true}]\ntest_split", "hf_evaluate: runs code"),
        ("dataset_path: json", "dataset_path: pandas", "dataset_path: pandas is not data that can be read here"),
        ("dataset_path: json", "dataset_path: ./loader.py", "loader.py is not data that can be read here"),
        ("{data_files: {test: test.jsonl}}", "{}", "json is not data that can be read here"),
        ("test.jsonl", "[test.jsonl, gone.jsonl]", "no such data file: gone.jsonl"),
        ("{data_files", "{data_dir: sub, data_files", "data_dir: isn't followed"),
        ("task: mine", "group: mine\ntask: [a, b]", "is not a task"),
        ("task: mine", "task: {mine", "not YAML"),
        ("task: mine", "include: mine.yaml\ntask: mine", "includes itself"),
        ("task: mine", "include: none.yaml\ntask: mine", "none.yaml: can't be read: No such file"),
    ],
)
def test_what_can_not_be_run_is_refused_before_anything_runs(file, old, new, words):
    """With the file, the key and a way out."""
    said = refused(file(GOOD.replace(old, new, 1)))
    assert len(said) == 1
    assert words in said[0]
    assert "mine.yaml" in said[0] or "none.yaml" in said[0]
    assert "remedy" in said[0]


def test_a_hub_dataset_needs_no_file_here(file):
    """It is fetched when the task runs."""
    text = GOOD.replace("dataset_path: json", "dataset_path: PolyAI/banking77").replace(
        "dataset_kwargs", "# dataset_kwargs"
    )
    (found,) = lm_eval_files.read(file(text))
    assert len(found.files) == 1


def test_names_are_those_of_the_installed_lm_eval(file, tmp_path):
    """A name that its files have is taken, another gets what was probably meant; wrong files are told at the same time."""
    shipped = tmp_path / "site" / "lm_eval" / "tasks" / "arc"
    shipped.mkdir(parents=True)
    (shipped / "arc_easy.yaml").write_text("tag:\n  - ai2_arc\ntask: arc_easy\n")
    (tmp_path / "bin").mkdir()
    judges = Environment("judges", tmp_path / "bin" / "python", (tmp_path / "site",))
    (tmp_path / "pyvenv.cfg").write_text("")
    good = [{"task": "arc_easy"}, {"task": "ai2_arc"}, {"task": str(file(GOOD))}]
    assert lm_eval_files.tasks_digest(good, judges) != lm_eval_files.tasks_digest(good[:2], judges)
    with pytest.raises(ConfigError) as caught:
        lm_eval_files.tasks_digest([*good, {"task": "arc_eazy"}, {"task": str(tmp_path / "no.yaml")}], judges)
    name, path = caught.value.problems
    assert (name.key, name.allowed) == ("evaluate.tasks[3].task", "did you mean arc_easy?")
    assert path.file == str(tmp_path / "no.yaml")


def test_a_path_is_told_from_a_name_by_its_spelling(tmp_path):
    """A slash or .yaml makes a path, beside the config or under the data folder; a folder named like a task changes nothing."""
    (tmp_path / "arc_easy").mkdir()
    config = tmp_path / "use.yaml"
    config.write_text(
        "datasets: [{path: t.jsonl}]\nevaluate: {tasks: [{task: arc_easy}, {task: mine.yaml}, {task: ./tasks}]}\n"
    )
    found = [entry.task for entry in load(config).evaluate.tasks]
    assert found == ["arc_easy", str(tmp_path / "mine.yaml"), str(tmp_path / "tasks")]
    assert load(config, data_dir=tmp_path / "data").evaluate.tasks[1].task == str(tmp_path / "data" / "mine.yaml")
