from __future__ import annotations

import gzip
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config.schema import DataConfig, DatasetSource
from pipeline.data.sources import is_hub_id, sources_digest
from pipeline.errors import ConfigError, DataError


def config(*paths: str | Path, test: tuple[str | Path, ...] = (), revision: str | None = None) -> dict:
    def sources(names: tuple[str | Path, ...]) -> tuple[DatasetSource, ...]:
        return tuple(DatasetSource(path=str(name), revision=revision) for name in names)

    return DataConfig(datasets=sources(paths), test_datasets=sources(test)).model_dump(mode="json")


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("TUNEGATE_HOME", str(tmp_path / "home"))


def make(file: Path, text: str = '{"text": "x"}\n') -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


def test_the_digest_follows_the_bytes_not_the_place(tmp_path: Path) -> None:
    """A copy in another folder has the same digest; a changed byte or another role of a file has not."""
    first, copy = make(tmp_path / "a" / "rows.jsonl"), make(tmp_path / "b" / "rows.jsonl")
    digest = sources_digest(config(first))
    assert sources_digest(config(copy)) == digest
    assert sources_digest(config(first, test=(copy,))) != sources_digest(config(first, copy)) != digest
    make(first, '{"text": "y"}\n')
    os.utime(first, ns=(1, 1))
    assert sources_digest(config(first)) != digest


def test_a_folder_counts_with_all_its_data_files(tmp_path: Path) -> None:
    """Files of subfolders count, hidden ones and others than data files don't."""
    make(tmp_path / "d" / "one.jsonl")
    digest = sources_digest(config(tmp_path / "d"))
    make(tmp_path / "d" / "README.md")
    make(tmp_path / "d" / ".cache" / "two.jsonl")
    assert sources_digest(config(tmp_path / "d")) == digest
    make(tmp_path / "d" / "deep" / "two.csv")
    assert sources_digest(config(tmp_path / "d")) != digest


def test_every_missing_file_is_named_with_its_neighbours(tmp_path: Path) -> None:
    """All wrong paths are named at once; one beside other data files lists them."""
    make(tmp_path / "train.jsonl")
    make(tmp_path / "notes.txt")
    with pytest.raises(DataError) as raised:
        sources_digest(config(tmp_path / "trian.jsonl", tmp_path / "notes.txt", "/nowhere/at/all.csv"))
    first, second, third = raised.value.problems
    assert first.file == str(tmp_path / "trian.jsonl")
    assert first.allowed == "train.jsonl"
    assert "correct the path" in first.remedy
    assert second.what == ".txt is not supported"
    assert third.allowed is None


def test_what_is_allowed_is_data(tmp_path: Path) -> None:
    """No configs that lie beside it; folders where a folder may have been meant."""
    make(tmp_path / "use.yaml")
    make(tmp_path / "questions" / "one.jsonl")
    for path, allowed in (("answers", "questions"), ("answers.jsonl", None)):
        with pytest.raises(DataError) as raised:
            sources_digest(config(tmp_path / path))
        assert raised.value.problems[0].allowed == allowed


def test_the_demos_data_is_made_by_the_command_that_the_remedy_names(tmp_path: Path) -> None:
    """A fresh clone has a config for data that isn't there yet."""
    for folder in (tmp_path, tmp_path / "home" / "demo"):
        with pytest.raises(DataError) as raised:
            sources_digest(config(folder / "tickets-train.jsonl", test=(folder / "tickets-holdout.jsonl",)))
        for problem in raised.value.problems:
            assert problem.remedy == (
                f"tunegate demo --data-only, then the same command with --data-dir {tmp_path}/home/demo"
            )


def test_a_benchmark_counts_and_a_missing_one_is_named_by_its_key(tmp_path: Path) -> None:
    """Its bytes are part of the digest, .txt files among them; a wrong path is told with key and remedy, like others."""
    train, lines = make(tmp_path / "train.jsonl"), make(tmp_path / "benchmark" / "lines.txt", "one document\n")
    plain = config(train)
    with_benchmark = {**plain, "benchmarks": [{"path": str(lines.parent), "split": "test", "revision": None}]}
    digest = sources_digest(with_benchmark)
    assert digest != sources_digest(plain)
    make(lines, "another document\n")
    os.utime(lines, ns=(1, 1))
    assert sources_digest(with_benchmark) != digest
    wrong = {**config(tmp_path / "trian.jsonl"), "benchmarks": [{"path": str(tmp_path / "mmlu.jsonl")}]}
    with pytest.raises(DataError) as raised:
        sources_digest(wrong)
    first, second = raised.value.problems
    assert (first.key, second.key) == ("data.datasets.0.path", "data.benchmarks.0.path")
    assert second.allowed == "train.jsonl"
    assert "correct the path" in second.remedy


def test_packed_data_in_a_folder_is_not_passed_over(tmp_path: Path) -> None:
    """A packed file among unpacked ones is a mistake, not a file to be ignored."""
    make(tmp_path / "one.jsonl")
    (tmp_path / "two.jsonl.gz").write_bytes(gzip.compress(b"{}"))
    with pytest.raises(DataError, match=r"holds packed data: two\.jsonl\.gz"):
        sources_digest(config(tmp_path))


def test_a_hub_dataset_needs_a_commit_and_is_known_by_it(tmp_path: Path) -> None:
    """Without a revision the config is wrong; with one the digest needs no network."""
    for revision in (None, "main"):
        with pytest.raises(ConfigError, match="must be pinned to a commit"):
            sources_digest(config("owner/questions", revision=revision))
    first, second = (sources_digest(config("owner/questions", revision=commit)) for commit in ("a" * 40, "b" * 40))
    assert first != second


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("owner/name", True),
        ("owner/name.jsonl", False),
        ("name", False),
        ("/abs/name", False),
        ("a/b/c", False),
    ],
)
def test_a_hub_id_is_told_from_a_path(path: str, expected: bool) -> None:
    """OWNER/NAME without a data file's suffix is a hub id."""
    assert is_hub_id(path) is expected


def test_asking_for_the_digest_imports_nothing_heavy() -> None:
    """`tunegate check` may import the room: the standard library is all it brings."""
    heavy = ("pydantic", "numpy", "pandas", "pyarrow", "torch", "transformers", "datasets", "sqlite3")
    code = f"import sys, pipeline.data.sources; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[3])
    assert done.stdout.strip() == "[]", done.stderr
