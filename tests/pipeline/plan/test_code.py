"""A stage's source digest: what changes it, and what doesn't."""

from __future__ import annotations

import ast
import os
import shutil
from pathlib import Path

import pytest

from pipeline import store
from pipeline.plan import code, meaning, plan, steps

ROOT = Path(__file__).parents[3]
SOURCES = sorted(path for path in (ROOT / "pipeline").rglob("*.py") if "avx2" not in path.parts)
PROGRAMS = {
    step.stage: step.program
    for step in steps.all_steps(
        {"quantize": {"method": "awq", "backend": "llmcompressor"}, "evaluate": {"ledger_items": 1}}
    )
}


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A copy of pipeline/ that may be changed, and a store for what is remembered of it."""
    shutil.copytree(ROOT / "pipeline", tmp_path / "pipeline", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("TUNEGATE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(code, "ROOT", tmp_path)
    return tmp_path / "pipeline"


def edit(file: Path, old: str, new: str) -> None:
    """Replace a text that must be there."""
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new, 1), encoding="utf-8")


def digests() -> dict[str, str]:
    """Every stage's source digest now."""
    return {stage: code.source_digest(program) for stage, program in PROGRAMS.items()}


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("finetune/loss.py", "from __future__", "# a comment\nfrom __future__"),
        ("finetune/loss.py", '"""', '"""Another docstring. '),
        ("finetune/plots.py", '"#1f4e79"', '"#aa0000"'),
        ("data/plots.py", "figsize=", "dpi=90, figsize="),
        ("data/report.py", "import annotations\n", "import annotations\nSENTENCE = 'more is said'\n"),
        ("report/content.py", "import annotations\n", "import annotations\nSENTENCE = 'more is said'\n"),
        ("errors.py", '"""', '"""Another docstring. '),
    ],
)
def test_what_only_people_read_retrains_nothing(tree, file, old, new):
    """A comment, a docstring, a plot's colour, a report's sentence."""
    before = digests()
    edit(tree / file, old, new)
    assert digests() == before


def test_errors_and_progress_are_told_in_other_words_and_retrain_nothing(tree):
    """Every string in a raise, in a Problem and in a told line counts for nothing."""
    stage = tree / "stage.py"
    text = (
        'from pipeline import program\n\n\ndef run(n):\n    program.message(f"row {n}")\n    if n:\n'
        '        raise ValueError(f"{n} is wrong")\n    return Problem("x", remedy="y")\n'
    )
    stage.write_text(text)
    before = code.source_digest("pipeline.stage")
    stage.write_text(text.replace("row", "rows").replace("is wrong", "must be right").replace('"y"', '"z"'))
    assert code.source_digest("pipeline.stage") == before
    stage.write_text(text.replace("if n:", "if n > 1:"))
    assert code.source_digest("pipeline.stage") != before


@pytest.mark.parametrize(
    ("file", "old", "new", "changed"),
    [
        (
            "finetune/loss.py",
            "import annotations\n",
            "import annotations\nSCALE = 2\n",
            {"finetune", "merge", "ledger"},
        ),
        ("finetune/packing.py", "IGNORED = -100", "IGNORED = -101", {"finetune", "merge", "ledger"}),
        ("data/splits.py", "import annotations\n", "import annotations\nSCALE = 2\n", {"prepare"}),
        ("quantize/calibration.py", "import annotations\n", "import annotations\nSCALE = 2\n", {"quantize"}),
    ],
)
def test_a_changed_decision_makes_its_stages_anew(tree, file, old, new, changed):
    """A loss, a constant, a split: the stages that reach it, and no other."""
    before = digests()
    edit(tree / file, old, new)
    after = digests()
    assert {stage for stage in before if before[stage] != after[stage]} >= changed
    assert before["base"] == after["base"]


def test_an_import_over_three_files_counts(tree):
    """Also under another name, inside a function and over several lines; what nobody reaches counts for nothing."""
    texts = {
        "stage": "from pipeline import (\n    one as first,  # why\n)\n", "one": "def f():\n    from pipeline.two import x\n",
        "two": 'NAME = "pipeline.three"\n', "three": "x = 1\n", "four": "x = 1\n",
    }  # fmt: skip
    for name, text in texts.items():
        (tree / f"{name}.py").write_text(text)
    before = code.source_digest("pipeline.stage")
    (tree / "four.py").write_text("x = 2\n")
    assert code.source_digest("pipeline.stage") == before
    (tree / "three.py").write_text("x = 2\n")
    assert code.source_digest("pipeline.stage") != before


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: "/".join(file.parts[-2:]))
def test_no_import_escapes_a_key(file):
    """What is imported is reached, but for what the module lists as showing its result."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "pipeline":
            imported |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    shown = set(meaning._shown(tree))
    assert set(meaning.read(file.read_text(encoding="utf-8"))[1]) >= imported - shown
    assert all((ROOT / f"{name.replace('.', '/')}.py").is_file() for name in shown)


def test_a_program_that_is_started_by_name_is_part_of_the_source():
    """Training over several processes starts each rank as a program of its own."""
    assert "pipeline.finetune.rank" in code.modules(PROGRAMS["finetune"])


def test_a_file_is_read_again_when_only_its_time_changed(tree):
    """An edit that keeps the size is an edit; a file that stays is not parsed again, in a later process neither."""
    file = tree / "stage.py"
    file.write_text("x = 1\n")
    first = code.source_digest("pipeline.stage")
    file.write_text("x = 2\n")
    os.utime(file, ns=(1, 1))
    assert code.source_digest("pipeline.stage") != first


def test_a_later_process_parses_nothing_that_stays(tree, monkeypatch):
    """Size, time and inode are enough."""
    first = digests()
    code._memory.cache_clear()
    monkeypatch.setattr(meaning, "read", None)
    assert digests() == first


def test_no_store_is_made_to_remember(tree, tmp_path, monkeypatch):
    """A config that is refused leaves no mlruns behind."""
    monkeypatch.setenv("TUNEGATE_HOME", str(tmp_path / "other"))
    assert digests()
    assert not store.home().exists()


def key(config=None, inputs=None, made_by=None) -> str:
    """The key of the stage finetune."""
    (step,) = (step for step in steps.steps({"quantize": {"method": "none"}}) if step.stage == "finetune")
    whole = {"finetune": {"learning_rate": 1e-4}, "data": {"sequence_len": 8}, "seed": 1, **(config or {})}
    return plan.key_of(step, whole, inputs or {"prepare": "a"}, made_by or {"torch": "1"})


def test_a_changed_default_data_file_or_package_is_another_key():
    """A default counts by the value that the config resolves to; a section that the stage doesn't read counts for nothing."""
    first = key()
    assert key({"finetune": {"learning_rate": 2e-4}}) != first
    assert key(inputs={"prepare": "b"}) != first
    assert key(made_by={"torch": "2"}) != first
    assert key({"promote": {"port": 1}}) == first
