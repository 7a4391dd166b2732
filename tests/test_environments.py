"""Which interpreter a stage gets, what its packages' versions are, and what a child is handed."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline import environments, install
from pipeline.errors import EnvironmentMissing


@dataclass
class Setting:
    """What the config says about an environment."""

    interpreter: str | None = None
    pythonpath: tuple[str, ...] = ()


@pytest.fixture
def venvs(tmp_path, monkeypatch):
    """An empty folder for environments."""
    monkeypatch.setenv("TUNEGATE_VENVS", str(tmp_path / "venvs"))
    return tmp_path / "venvs"


def made(venvs: Path, name: str, distributions: tuple[str, ...] = ()) -> Path:
    """A virtual environment as far as it is looked at without being started; its interpreter can't be."""
    packages = venvs / name / "lib" / "python3.11" / "site-packages"
    packages.mkdir(parents=True)
    (venvs / name / "bin").mkdir()
    (venvs / name / "pyvenv.cfg").write_text("home = /usr/bin\ninclude-system-site-packages = false\n")
    python = venvs / name / "bin" / "python"
    python.write_text("#!/bin/sh\nexit 9\n")
    python.chmod(0o755)
    for distribution in distributions:
        (packages / f"{distribution}.dist-info").mkdir()
    stamp = {"device": "cpu", "digest": install.digest(name, "cpu")}
    (venvs / name / install.STAMP).write_text(json.dumps(stamp))
    return packages


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("train", "make setup"),
        ("autoawq", "python3 -m pipeline.install autoawq"),
        ("judges", "python3 -m pipeline.install judges"),
    ],
)
def test_an_environment_that_is_not_there_is_named_with_the_command_that_makes_it(venvs, name, command):
    """The default ones come with the set-up, AutoAWQ's only when asked for."""
    with pytest.raises(EnvironmentMissing, match=f"the {name} environment isn't there") as caught:
        environments.find(name)
    assert caught.value.problems[0].remedy == command


def test_a_half_made_environment_is_not_used(venvs):
    """An interpreter without the stamp that is written last may lack any package."""
    made(venvs, "train")
    assert environments.find("train").interpreter == venvs / "train" / "bin" / "python"
    (venvs / "train" / install.STAMP).unlink()
    with pytest.raises(EnvironmentMissing, match="half-made"):
        environments.find("train")


def test_a_config_names_any_interpreter_and_folders(venvs, tmp_path):
    """A host without virtual environments names a Python, by path or command, and its packages' folders."""
    settings = {"serve": Setting(sys.executable, (str(tmp_path),))}
    found = environments.find("serve", settings)
    assert found == environments.Environment("serve", Path(sys.executable), (tmp_path,))
    assert environments.find("serve", {"serve": Setting("python3")}).interpreter.name == "python3"


def test_a_config_may_add_folders_to_the_environment_made_here(venvs, tmp_path):
    """A pythonpath without an interpreter keeps the virtual environment's."""
    made(venvs, "train")
    found = environments.find("train", {"train": Setting(pythonpath=(str(tmp_path),))})
    assert found.interpreter == venvs / "train" / "bin" / "python"
    assert found.pythonpath == (tmp_path,)


def test_all_that_is_wrong_with_a_setting_is_said_at_once(venvs):
    """A missing interpreter and two missing folders are three problems of one error."""
    with pytest.raises(EnvironmentMissing) as caught:
        environments.find("train", {"train": Setting("/no/python", ("/no/a", "/no/b"))})
    assert [problem.key for problem in caught.value.problems] == [
        "environments.train.interpreter",
        "environments.train.pythonpath",
        "environments.train.pythonpath",
    ]


def test_versions_are_read_without_starting_the_interpreter(venvs):
    """Metadata folders' names tell, spelt as asked; the interpreter here would end with an error."""
    made(venvs, "train", ("torch-2.13.0+cpu", "PyYAML-6.0.3", "compressed_tensors-0.19.0"))
    versions = environments.versions(environments.find("train"), ["torch", "pyyaml", "compressed-tensors"])
    assert versions == {"torch": "2.13.0+cpu", "pyyaml": "6.0.3", "compressed-tensors": "0.19.0"}


def test_a_folder_on_the_pythonpath_comes_before_the_environment(venvs, tmp_path):
    """The version told is that of the package which is imported."""
    made(venvs, "serve", ("vllm-1.0",))
    (tmp_path / "site" / "vllm-2.0.dist-info").mkdir(parents=True)
    found = environments.find("serve", {"serve": Setting(pythonpath=(str(tmp_path / "site"),))})
    assert environments.versions(found, ["vllm"]) == {"vllm": "2.0"}


def test_a_bare_interpreter_is_asked_for_its_import_path(tmp_path):
    """Without a virtual environment the interpreter says where its packages are, PYTHONPATH first."""
    (tmp_path / "torch-2.11.0+cu130.dist-info").mkdir()
    bare = Path(sys.base_prefix) / "bin" / "python3"
    env = environments.Environment("train", bare, (tmp_path,))
    assert environments.versions(env, ["torch"]) == {"torch": "2.11.0+cu130"}


def test_packages_that_are_missing_are_named_together(venvs):
    """The error names every missing package, the environment and the command."""
    made(venvs, "train", ("torch-2.13.0",))
    with pytest.raises(EnvironmentMissing, match="peft, datasets not installed in train") as caught:
        environments.versions(environments.find("train"), ["peft", "torch", "datasets"])
    assert caught.value.problems[0].remedy == "make setup"


def test_an_interpreter_that_does_not_start_is_an_error_about_the_config(tmp_path):
    """A program that is no Python is told as such, with the key to correct."""
    env = environments.Environment("serve", Path("/bin/false"))
    with pytest.raises(EnvironmentMissing, match="/bin/false does not start") as caught:
        environments.versions(env, ["vllm"])
    assert caught.value.problems[0].key == "environments.serve.interpreter"


def test_a_child_imports_the_project_and_nothing_from_the_folder_it_runs_in(tmp_path):
    """A user's file that is named like a module doesn't shadow it."""
    (tmp_path / "json.py").write_text("raise SystemExit('shadowed')")
    (tmp_path / "extra").mkdir()
    (tmp_path / "extra" / "mine.py").write_text("")
    env = environments.Environment("train", Path(sys.executable), (tmp_path / "extra",))
    code = "from pipeline import errors\nprint(json.dumps([mine.__file__, errors.__file__]))\n"
    (tmp_path / "extra" / "probe.py").write_text(f"import json, mine\n{code}")
    shown = subprocess.run(
        environments.command(env, "probe"),
        cwd=tmp_path,
        env=environments.child_environ(env),
        capture_output=True,
        text=True,
        check=True,
    )
    mine, errors = json.loads(shown.stdout)
    assert mine == str(tmp_path / "extra" / "mine.py")
    assert errors == str(environments.ROOT / "pipeline" / "errors.py")


def test_a_child_gets_no_secret_that_it_does_not_need(monkeypatch):
    """Tokens, passwords and keys stay with the parent unless asked for; settings pass."""
    secrets = (
        "HF_TOKEN",
        "MLFLOW_TRACKING_PASSWORD",
        "AWS_SECRET_ACCESS_KEY",
        "PREFECT_API_KEY",
        "PREFECT_API_AUTH_STRING",
        "VLLM_API_KEY",
    )
    for name in secrets:
        monkeypatch.setenv(name, "hidden")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    env = environments.Environment("train", Path(sys.executable))
    assert "hidden" not in environments.child_environ(env).values()
    assert environments.child_environ(env)["TOKENIZERS_PARALLELISM"] == "false"
    kept = environments.child_environ(env, keep=["HF_TOKEN"])
    assert [name for name in secrets if name in kept] == ["HF_TOKEN"]


def test_a_child_finds_the_tools_of_its_own_environment_first(monkeypatch):
    """Compilers' helpers such as ninja lie beside the interpreter; the parent's activation doesn't count."""
    monkeypatch.setenv("VIRTUAL_ENV", "/the/parents")
    found = environments.child_environ(environments.Environment("serve", Path("/venv/bin/python")))
    assert found["PATH"].startswith(f"/venv/bin{os.pathsep}")
    assert "VIRTUAL_ENV" not in found


def test_without_a_control_environment_this_process_is_it(venvs, monkeypatch, tmp_path):
    """On a host without virtual environments what runs the flow also runs its HTTP clients."""
    monkeypatch.setenv("PYTHONPATH", f"{environments.ROOT}{os.pathsep}{tmp_path}")
    found = environments.find("control")
    assert found == environments.Environment("control", Path(sys.executable), (tmp_path,))


def findings(**settings: Setting) -> dict[str, environments.Finding]:
    return {finding.name: finding for finding in environments.doctor(settings)}


def test_doctor_tells_what_is_missing_and_how_to_get_it(venvs):
    """Everything that isn't there comes with a remedy; AutoAWQ, lm-eval, containers and a GPU aren't needed."""
    found = findings()
    assert found["environment train"].detail.startswith("the train environment isn't there")
    assert [finding.name for finding in found.values() if not finding.ok and not finding.remedy] == []
    assert not found["environment autoawq"].needed
    assert found["environment autoawq"].remedy == "python3 -m pipeline.install autoawq"
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
    assert found["environment train"].detail == "/no/python is no program"


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
    found = {one.name: one for one in environments.doctor(runtime="docker")}
    assert found["container engine"].detail == f"nobody answers at {place}"
    assert (found["container engine"].needed, found["environment serve"].needed) == (True, False)
    assert "podman" in found["container engine"].remedy.lower()


def test_the_module_costs_little_to_import():
    """`tunegate check` imports it: neither pydantic nor argparse nor a network module comes with it."""
    code = "import sys, pipeline.environments; print(*sys.modules)"
    shown = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=environments.ROOT, capture_output=True, text=True, check=True
    )
    assert not {"pydantic", "yaml", "argparse", "socket", "asyncio"} & set(shown.stdout.split())


def test_an_environment_of_another_name_is_refused_with_those_there_are():
    """A name that came out of a file is no reason for a traceback."""
    with pytest.raises(EnvironmentMissing) as caught:
        environments.find("jugdes")
    assert caught.value.problems[0].allowed == "control, train, serve, autoawq, judges"
