"""CI's rule about skips, on a small test folder with the real conftest."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def run(
    folder: Path, body: str, edits: dict[str, str] | None = None, *, workers: int = 0, **environ: str
) -> subprocess.CompletedProcess[str]:
    conftest = (Path(__file__).parents[1] / "conftest.py").read_text()
    for old, new in (edits or {}).items():
        assert old in conftest
        conftest = conftest.replace(old, new)
    (folder / "conftest.py").write_text(conftest)
    (folder / "test_it.py").write_text(f"import pytest\n\n{body}\n")
    (folder / "pytest.ini").write_text("[pytest]\n")
    env = {key: value for key, value in os.environ.items() if key not in ("CI", "PYTEST_ADDOPTS")}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-n", str(workers), str(folder)]
    return subprocess.run(command, cwd=folder, env={**env, **environ}, capture_output=True, text=True)


SKIPPING = "def test_one():\n    pytest.skip('no reason')\n\ndef test_two():\n    pass"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_skip_that_is_not_listed_fails_ci_and_only_ci(tmp_path, workers):
    """The skipped test is named, and the summary stays the last line; with workers too."""
    assert run(tmp_path, SKIPPING, workers=workers).returncode == 0
    in_ci = run(tmp_path, SKIPPING, workers=workers, CI="true")
    assert in_ci.returncode == 1
    assert "test_it.py::test_one\n" in in_ci.stdout
    assert "1 passed, 1 skipped" in in_ci.stdout.strip().splitlines()[-1]


@pytest.mark.parametrize("mark", ["@pytest.mark.skip", "@pytest.mark.skipif('True', reason='')"])
def test_a_skip_by_mark_is_no_way_round(tmp_path, mark):
    """Marks that skip count as much as a call."""
    assert run(tmp_path, f"{mark}\ndef test_one():\n    pass", CI="true").returncode == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_skips_itself_whole_fails_ci(tmp_path, workers):
    """An importorskip at the top of a file would otherwise drop its tests silently, beside others that pass."""
    (tmp_path / "test_other.py").write_text("def test_two():\n    pass\n")
    ended = run(tmp_path, "pytest.importorskip('absent')\ndef test_one():\n    pass", workers=workers, CI="true")
    assert ended.returncode == 1
    assert "test_it.py skips itself whole" in ended.stdout
    assert "1 passed" in ended.stdout


def test_expected_failures_and_passes_are_no_skips(tmp_path):
    """An xfail is reported as skipped by pytest but left nothing out."""
    body = "@pytest.mark.xfail\ndef test_one():\n    assert 0\n\ndef test_two():\n    pass"
    assert run(tmp_path, body, CI="true").returncode == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_a_listed_skip_passes(tmp_path, workers):
    """ALLOWED_SKIPS names the start of a test's id."""
    allowed = {
        "ALLOWED_SKIPS: dict[str, str] = {": "ALLOWED_SKIPS: dict[str, str] = {'test_it.py::test_one': 'because', "
    }
    assert run(tmp_path, SKIPPING, allowed, workers=workers, CI="true").returncode == 0


def test_the_longest_files_come_first(tmp_path):
    """Whatever their names, and the others stay in order."""
    (tmp_path / "tests").mkdir()
    for name in ("test_a.py", "test_b.py", "test_z.py"):
        (tmp_path / "tests" / name).write_text("def test_it():\n    pass\n")
    conftest = (Path(__file__).parents[1] / "conftest.py").read_text()
    listed = conftest[conftest.index("LONGEST_FIRST = ") : conftest.index("\n\n\nclass Skips")]
    ended = run(tmp_path, "", {listed: "LONGEST_FIRST = ('test_z.py',)"})
    assert ended.returncode == 0, ended.stdout
    ran = [line.split()[0] for line in ended.stdout.splitlines() if line.startswith("tests/")]
    assert ran == ["tests/test_z.py", "tests/test_a.py", "tests/test_b.py"]
