from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest
from support import model_folder, programs

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FETCH = """
import json, sys
from pipeline.model import hub
from pipeline.model import checks as model_checks
from pipeline.errors import ModelError
answers = {}
for repository in sys.argv[2:]:
    try:
        folder, cache = hub.fetch(repository, sys.argv[1])
        names = sorted(path.name for path in folder.iterdir())
        answers[repository] = {"names": names, "problems": len(model_checks.problems(folder, cache))}
    except ModelError as error:
        answers[repository] = {"error": [vars(problem) for problem in error.problems]}
print(json.dumps(answers))
"""


class FakeHub(BaseHTTPRequestHandler):
    """Speaks the hub's HTTP as far as a download at a commit needs; `models` are folders by repository."""

    models: ClassVar = {}
    asked: ClassVar = []

    def do_HEAD(self):
        """Answer a question for the headers."""
        self.do_GET(body=False)

    def do_GET(self, body=True):
        """Answer as the hub does: its error codes, a listing, or a file."""
        path = self.path.split("?")[0]
        type(self).asked.append(path)
        parts = path.removeprefix("/api/models/").strip("/").split("/")
        repository = "/".join(parts[:2])
        if repository == "meta/gated":
            return self.answer(403, b"{}", body, {"X-Error-Code": "GatedRepo"})
        if repository not in self.models:
            return self.answer(404, b"{}", body, {"X-Error-Code": "RepoNotFound"})
        if COMMIT not in parts:
            return self.answer(404, b"{}", body, {"X-Error-Code": "RevisionNotFound"})
        folder = self.models[repository]
        if path.startswith("/api/"):
            tree = [
                {
                    "type": "file",
                    "path": file.relative_to(folder).as_posix(),
                    "size": file.stat().st_size,
                    "oid": etag(file),
                }
                for file in sorted(folder.rglob("*"))
                if file.is_file()
            ]
            return self.answer(200, json.dumps(tree).encode(), body, {"Content-Type": "application/json"})
        file = folder / "/".join(parts[parts.index(COMMIT) + 1 :])
        return self.answer(200, file.read_bytes(), body, {"ETag": f'"{etag(file)}"', "X-Repo-Commit": COMMIT})

    def answer(self, status, content, body, headers):
        """Send one whole answer."""
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *args):
        """Say nothing."""


def etag(file):
    return hashlib.sha1(file.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A hub on loopback: what was asked of it, what it answered, and how it went without it."""
    root = tmp_path_factory.mktemp("hub")
    good = model_folder.make(root / "good")
    (good / "pytorch_model.bin").write_bytes(b"pickle")
    (good / "consolidated.safetensors").write_bytes(b"another copy")
    (good / "original").mkdir()
    (good / "original" / "consolidated.00.pth").write_bytes(b"pickle")
    pickles = model_folder.make(root / "pickles")
    (pickles / "model.safetensors").rename(pickles / "pytorch_model.bin")
    FakeHub.models = {
        "a/good": good,
        "a/pickles": pickles,
        "a/code": model_folder.make(root / "code", auto_map={"AutoModel": "x.Y"}),
    }
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    environ = {
        "HF_ENDPOINT": url,
        "HF_HOME": str(root / "home"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }

    def fetch(commit, *repositories, **extra):
        return json.loads(programs.python(FETCH, commit, *repositories, **{**environ, **extra}))

    online = fetch(COMMIT, "a/good", "a/pickles", "a/code", "meta/gated", "a/none")
    unknown = fetch(COMMIT[::-1], "a/good")
    asked = list(FakeHub.asked)
    server.shutdown()
    server.server_close()
    offline = fetch(COMMIT, "a/good", "a/other", HF_HUB_OFFLINE="1")
    return {"url": url, "asked": asked, "online": online, "unknown": unknown, "offline": offline,
            "down": fetch(COMMIT, "a/other")}  # fmt: skip


@pytest.mark.slow
def test_a_commit_is_fetched_without_pickle_and_passes_the_checks(hub):
    """Only safetensors, JSON, template and card are asked for; the cache's links are no problem."""
    found = hub["online"]["a/good"]
    assert found["problems"] == 0
    assert found["names"] == [
        "README.md", "chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    ]  # fmt: skip
    assert not [path for path in hub["asked"] if path.endswith((".bin", ".pth", "consolidated.safetensors"))]


@pytest.mark.slow
def test_auto_map_is_refused_before_the_weights_are_fetched(hub):
    """The small files are judged first."""
    assert [problem["key"] for problem in hub["online"]["a/code"]["error"]] == ["auto_map"]
    assert not [path for path in hub["asked"] if "a/code" in path and path.endswith(".safetensors")]


@pytest.mark.slow
def test_a_model_of_pickles_alone_has_no_weights(hub):
    """Its folder comes without weights, which the checks then tell."""
    assert hub["online"]["a/pickles"]["problems"] == 1


@pytest.mark.slow
def test_a_gated_model_says_which_page_to_accept_and_to_set_the_token(hub):
    """The remedy has the page's address and HF_TOKEN."""
    (problem,) = hub["online"]["meta/gated"]["error"]
    assert "gated" in problem["what"]
    assert f"{hub['url']}/meta/gated" in problem["remedy"]
    assert "HF_TOKEN" in problem["remedy"]


@pytest.mark.slow
def test_a_wrong_name_and_a_wrong_commit_are_told_apart(hub):
    """Each names the config key to correct."""
    assert hub["online"]["a/none"]["error"][0]["key"] == "base_model"
    assert hub["unknown"]["a/good"]["error"][0]["key"] == "base_model_revision"


@pytest.mark.slow
def test_offline_the_cache_serves_and_its_absence_is_told(hub):
    """A commit fetched once needs no hub; another one says how to get it, offline or unreachable."""
    assert hub["offline"]["a/good"]["problems"] == 0
    for way in ("offline", "down"):
        (problem,) = hub[way]["a/other"]["error"]
        assert "can't be reached" in problem["what"]
        assert "get online" in problem["remedy"]
