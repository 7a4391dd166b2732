"""Datasets on the hub, over a fake hub that speaks its HTTP on loopback."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
from support import programs

from pipeline.data.hub import split_files

COMMIT = "89abcdef0123456789abcdef0123456789abcdef"
FETCH = """
import json, sys
from pipeline.data.hub import fetch
from pipeline.errors import DataError
answers = {}
for asked in sys.argv[1:]:
    repository, revision, split = asked.split("|")
    try:
        files = fetch(repository, revision, split)
        answers[asked] = [[name, path.read_text()] for name, path in files]
    except DataError as error:
        answers[asked] = [vars(problem) for problem in error.problems]
print(json.dumps(answers))
"""


class FakeHub(BaseHTTPRequestHandler):
    """Speaks the hub's HTTP as far as datasets at a commit need; `files` by name."""

    files: ClassVar[dict[str, bytes]] = {
        "README.md": b"# Questions\n",
        "load.py": b"raise SystemExit\n",
        "data/train-00000.jsonl": b'{"text": "a"}\n',
        "data/train-00001.jsonl": b'{"text": "b"}\n',
        "data/test.csv": b"text\nc\n",
    }
    asked: ClassVar[list[str]] = []

    def do_HEAD(self) -> None:
        """Answer a question for the headers."""
        self.do_GET(body=False)

    def do_GET(self, *, body: bool = True) -> None:
        """Answer as the hub does: its error codes, a listing, or a file."""
        path = self.path.split("?")[0]
        self.asked.append(path)
        parts = path.removeprefix("/api").removeprefix("/datasets/").split("/")
        if parts[1] == "gated":
            self.answer(403, b"{}", body, {"X-Error-Code": "GatedRepo"})
        elif parts[1] != "questions":
            self.answer(404, b"{}", body, {"X-Error-Code": "RepoNotFound"})
        elif parts[3] != COMMIT:
            self.answer(404, b"{}", body, {"X-Error-Code": "RevisionNotFound"})
        elif parts[2] == "revision":
            siblings = [{"rfilename": name} for name in self.files]
            self.answer(200, json.dumps({"id": "owner/questions", "sha": COMMIT, "siblings": siblings}).encode(), body)
        else:
            content = self.files["/".join(parts[4:])]
            tag = hashlib.sha1(content).hexdigest()
            self.answer(200, content, body, {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT})

    def answer(self, status: int, content: bytes, body: bool, headers: dict[str, str] | None = None) -> None:
        """Send one response."""
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Stay quiet."""


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_a_dataset_is_fetched_at_its_commit_and_kept(hub: str, tmp_path: Path) -> None:
    """The split's files come, no code does, mistakes say what to do, and the cache serves offline."""
    train, test = (f"owner/questions|{COMMIT}|{split}" for split in ("train", "test"))
    wrong = {
        f"owner/questions|{COMMIT}|final": ("split final", "in the paths of its files"),
        f"owner/gated|{COMMIT}|train": ("gated", "HF_TOKEN"),
        f"owner/nothing|{COMMIT}|train": ("the dataset doesn't exist", "look at"),
        f"owner/questions|{'0' * 40}|train": ("the commit doesn't exist", "/commits/"),
    }
    cache = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    answers = json.loads(programs.python(FETCH, train, test, *wrong, HF_ENDPOINT=hub, **cache))
    assert answers[train] == [
        ["owner/questions/data/train-00000.jsonl", '{"text": "a"}\n'],
        ["owner/questions/data/train-00001.jsonl", '{"text": "b"}\n'],
    ]
    assert answers[test] == [["owner/questions/data/test.csv", "text\nc\n"]]
    assert not any(path.endswith("load.py") for path in FakeHub.asked)
    for asked, (what, remedy) in wrong.items():
        (problem,) = answers[asked]
        assert what in problem["what"]
        assert remedy in problem["remedy"]
    offline = {**cache, "HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    again = json.loads(programs.python(FETCH, train, test.replace("questions", "nothing"), **offline))
    assert again[train] == answers[train]
    assert "get online" in again[test.replace("questions", "nothing")][0]["remedy"]


@pytest.mark.parametrize(
    ("names", "split", "expected"),
    [
        (["train.csv", "test.csv", "README.md"], "train", ["train.csv"]),
        (["a/validation/x.parquet", "a/train/x.parquet"], "validation", ["a/validation/x.parquet"]),
        (["rows.jsonl", "more.jsonl"], "train", ["more.jsonl", "rows.jsonl"]),
        (["rows.jsonl"], "test", []),
        (["training.jsonl", "test.jsonl"], "train", []),
    ],
)
def test_files_belong_to_the_split_they_are_named_after(names: list[str], split: str, expected: list[str]) -> None:
    """A part of the path is the split's name; without any such name all files are train."""
    assert split_files(names, split) == expected
