from __future__ import annotations

import json
import os
import signal
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.errors import DataError, ServingError, StageFailed
from pipeline.evaluation import loadtest_container
from pipeline.program import Request
from pipeline.serving import docker


def test_a_container_can_read_what_is_mounted_whatever_the_umask(tmp_path, monkeypatch):
    """Umask 077 hides every file from the container's user; what is handed to the engine is readable for anybody."""
    seen: dict[str, list[int]] = {}

    def create(*_: object, volumes: dict[str, dict[str, str]], **__: object) -> None:
        for source, mount in volumes.items():
            places = [Path(source), *Path(source).rglob("*")]
            inside = {"/".join((mount["bind"], *place.relative_to(source).parts)): place for place in places}
            seen.update(
                {name: place.stat().st_mode & (0o5 if place.is_dir() else 0o4) for name, place in inside.items()}
            )
        raise ServingError("seen enough")

    @contextmanager
    def engine():
        yield SimpleNamespace(containers=SimpleNamespace(create=create))

    monkeypatch.setattr(docker, "engine", engine)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    before = os.umask(0o077)
    try:
        (tmp_path / "data" / "payload").mkdir(parents=True)
        (tmp_path / "data" / "payload" / "holdout.jsonl").write_text("{}\n")
        (tmp_path / "data" / "payload" / "train.jsonl").write_text("{}\n")
        model = tmp_path / "model"
        model.mkdir()
        (model / "tokenizer.json").write_text("{}")
        container = {"network": "host", "ulimits": {}}
        config = {"model_path": str(model), "container": container, "image": "sha256:0", "unit_digest": "u"}
        inputs = {"prepare": {"path": str(tmp_path / "data")}}
        with pytest.raises(ServingError, match="seen enough"):
            loadtest_container.run(Request(config, inputs, tmp_path / "work"))
    finally:
        os.umask(before)
    wanted = {
        "/work/request.json", "/work/payload", "/tunegate/pipeline/evaluation/loadtest.py", "/data/payload/holdout.jsonl",
        "/model/tokenizer.json",
    }  # fmt: skip
    assert wanted <= set(seen)
    assert [name for name, mode in seen.items() if not mode & 0o4] == []
    assert "/data/payload/train.jsonl" not in seen
    assert (tmp_path / "data" / "payload" / "holdout.jsonl").stat().st_mode & 0o077 == 0


@pytest.fixture
def run_with(tmp_path, monkeypatch):
    """Runs the stage with an engine whose container writes these lines and ends with this status; returns what was removed."""

    def run(lines: list[bytes], status: int) -> None:
        def logs(*, stdout: bool, stderr: bool, stream: bool = False):
            return iter(lines) if stream else b"Killed"

        container = SimpleNamespace(
            start=lambda: None, wait=lambda: {"StatusCode": status}, logs=logs, remove=lambda **_: None
        )

        @contextmanager
        def engine():
            yield SimpleNamespace(containers=SimpleNamespace(create=lambda *_, **__: container))

        monkeypatch.setattr(docker, "engine", engine)
        monkeypatch.setattr(signal, "signal", lambda *_: None)
        (tmp_path / "data" / "payload").mkdir(parents=True)
        (tmp_path / "data" / "payload" / "holdout.jsonl").write_text("{}\n")
        (tmp_path / "model").mkdir()
        config = {
            "model_path": str(tmp_path / "model"), "container": {"network": "host", "ulimits": {}}, "image": "sha256:0",
            "unit_digest": "u",
        }  # fmt: skip
        inputs = {"prepare": {"path": str(tmp_path / "data")}}
        loadtest_container.run(Request(config, inputs, tmp_path / "work"))

    return run


def test_a_container_that_died_is_told_with_its_status_and_a_remedy(run_with, tmp_path):
    """Its last words and the log's place; the folder that it wrote into is gone."""
    with pytest.raises(StageFailed, match=r"ended with status 137: Killed") as caught:
        run_with([], 137)
    (problem,) = caught.value.problems
    assert problem.file == str(tmp_path / "work" / "log.txt")
    assert "too little memory" in problem.remedy
    assert not (tmp_path / "work" / "container").exists()


def test_an_error_inside_is_raised_as_it_was(run_with):
    """Also where its line comes in two pieces."""
    problem = {
        "what": "the holdout is empty",
        "file": None,
        "line": None,
        "key": None,
        "allowed": None,
        "remedy": "more",
    }
    line = json.dumps({"event": "error", "type": "DataError", "problems": [problem]}).encode() + b"\n"
    with pytest.raises(DataError, match="the holdout is empty"):
        run_with([b"vLLM says hello\n" + line[:20], line[20:]], 2)
