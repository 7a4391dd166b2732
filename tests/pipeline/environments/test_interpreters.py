"""Which interpreter a stage gets, what its packages' versions are, and what a child is handed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.environment import made

from pipeline.environments import install, interpreters
from pipeline.environments.interpreters import Setting
from pipeline.errors import ConfigError, EnvironmentMissing


@pytest.fixture
def venvs(tmp_path, monkeypatch):
    """An empty folder for environments."""
    monkeypatch.setenv("TUNEGATE_VENVS", str(tmp_path / "venvs"))
    return tmp_path / "venvs"


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("train", "make setup"),
        ("autoawq", "python3 -m pipeline.environments autoawq"),
        ("judges", "python3 -m pipeline.environments judges"),
    ],
)
def test_an_environment_that_is_not_there_is_named_with_the_command_that_makes_it(venvs, name, command):
    """The default ones come with the set-up, AutoAWQ's only when asked for."""
    with pytest.raises(EnvironmentMissing, match=f"the {name} environment isn't there") as caught:
        interpreters.find(name)
    assert caught.value.problems[0].remedy == command


def test_a_half_made_environment_is_not_used(venvs):
    """An interpreter without the stamp that is written last may lack any package."""
    made(venvs, "train")
    assert interpreters.find("train").interpreter == venvs / "train" / "bin" / "python"
    (venvs / "train" / install.STAMP).unlink()
    with pytest.raises(EnvironmentMissing, match="half-made"):
        interpreters.find("train")


def test_a_config_names_any_interpreter_and_folders(venvs, tmp_path):
    """A host without virtual environments names a Python, by path or command, and its packages' folders."""
    settings = {"serve": Setting(sys.executable, (str(tmp_path),))}
    found = interpreters.find("serve", settings)
    assert found == interpreters.Environment("serve", Path(sys.executable), (tmp_path,))
    assert interpreters.find("serve", {"serve": Setting("python3")}).interpreter.name == "python3"


def test_a_config_may_add_folders_to_the_environment_made_here(venvs, tmp_path):
    """A pythonpath without an interpreter keeps the virtual environment's."""
    made(venvs, "train")
    found = interpreters.find("train", {"train": Setting(pythonpath=(str(tmp_path),))})
    assert found.interpreter == venvs / "train" / "bin" / "python"
    assert found.pythonpath == (tmp_path,)


def test_all_that_is_wrong_with_a_setting_is_said_at_once(venvs):
    """A missing interpreter and two missing folders are three problems of one error."""
    with pytest.raises(EnvironmentMissing) as caught:
        interpreters.find("train", {"train": Setting("/no/python", ("/no/a", "/no/b"))})
    assert [problem.key for problem in caught.value.problems] == [
        "environments.train.interpreter",
        "environments.train.pythonpath",
        "environments.train.pythonpath",
    ]


def test_versions_are_read_without_starting_the_interpreter(venvs):
    """Metadata folders' names tell, spelt as asked; the interpreter here would end with an error."""
    made(venvs, "train", ("torch-2.13.0+cpu", "PyYAML-6.0.3", "compressed_tensors-0.19.0"))
    versions = interpreters.versions(interpreters.find("train"), ["torch", "pyyaml", "compressed-tensors"])
    assert versions == {"torch": "2.13.0+cpu", "pyyaml": "6.0.3", "compressed-tensors": "0.19.0"}


def test_a_folder_on_the_pythonpath_comes_before_the_environment(venvs, tmp_path):
    """The version told is that of the package which is imported."""
    made(venvs, "serve", ("vllm-1.0",))
    (tmp_path / "site" / "vllm-2.0.dist-info").mkdir(parents=True)
    found = interpreters.find("serve", {"serve": Setting(pythonpath=(str(tmp_path / "site"),))})
    assert interpreters.versions(found, ["vllm"]) == {"vllm": "2.0"}


def test_a_bare_interpreter_is_asked_for_its_import_path(tmp_path):
    """Without a virtual environment the interpreter says where its packages are, PYTHONPATH first."""
    (tmp_path / "torch-2.11.0+cu130.dist-info").mkdir()
    bare = Path(sys.base_prefix) / "bin" / "python3"
    env = interpreters.Environment("train", bare, (tmp_path,))
    assert interpreters.versions(env, ["torch"]) == {"torch": "2.11.0+cu130"}


def test_packages_that_are_missing_are_named_together(venvs):
    """The error names every missing package, the environment and the command."""
    made(venvs, "train", ("torch-2.13.0",))
    with pytest.raises(EnvironmentMissing, match="peft, datasets not installed in train") as caught:
        interpreters.versions(interpreters.find("train"), ["peft", "torch", "datasets"])
    assert caught.value.problems[0].remedy == "make setup"


def test_an_interpreter_that_does_not_start_is_an_error_about_the_config(tmp_path):
    """A program that is no Python is told as such, with the key to correct."""
    env = interpreters.Environment("serve", Path("/bin/false"))
    with pytest.raises(EnvironmentMissing, match="/bin/false does not start") as caught:
        interpreters.versions(env, ["vllm"])
    assert caught.value.problems[0].key == "environments.serve.interpreter"


def test_a_child_imports_the_project_and_nothing_from_the_folder_it_runs_in(tmp_path):
    """A user's file that is named like a module doesn't shadow it."""
    (tmp_path / "json.py").write_text("raise SystemExit('shadowed')")
    (tmp_path / "extra").mkdir()
    (tmp_path / "extra" / "mine.py").write_text("")
    env = interpreters.Environment("train", Path(sys.executable), (tmp_path / "extra",))
    code = "from pipeline import errors\nprint(json.dumps([mine.__file__, errors.__file__]))\n"
    (tmp_path / "extra" / "probe.py").write_text(f"import json, mine\n{code}")
    shown = subprocess.run(
        interpreters.command(env, "probe"),
        cwd=tmp_path,
        env=interpreters.child_environ(env),
        capture_output=True,
        text=True,
        check=True,
    )
    mine, errors = json.loads(shown.stdout)
    assert mine == str(tmp_path / "extra" / "mine.py")
    assert errors == str(interpreters.ROOT / "pipeline" / "errors.py")


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
    env = interpreters.Environment("train", Path(sys.executable))
    assert "hidden" not in interpreters.child_environ(env).values()
    assert interpreters.child_environ(env)["TOKENIZERS_PARALLELISM"] == "false"
    kept = interpreters.child_environ(env, keep=["HF_TOKEN"])
    assert [name for name in secrets if name in kept] == ["HF_TOKEN"]


def test_a_child_finds_the_tools_of_its_own_environment_first(monkeypatch):
    """Compilers' helpers such as ninja lie beside the interpreter; the parent's activation doesn't count."""
    monkeypatch.setenv("VIRTUAL_ENV", "/the/parents")
    found = interpreters.child_environ(interpreters.Environment("serve", Path("/venv/bin/python")))
    assert found["PATH"].startswith(f"/venv/bin{os.pathsep}")
    assert "VIRTUAL_ENV" not in found


def test_without_a_control_environment_this_process_is_it(venvs, monkeypatch, tmp_path):
    """On a host without virtual environments what runs the flow also runs its HTTP clients."""
    monkeypatch.setenv("PYTHONPATH", f"{interpreters.ROOT}{os.pathsep}{tmp_path}")
    found = interpreters.find("control")
    assert found == interpreters.Environment("control", Path(sys.executable), (tmp_path,))


@pytest.fixture
def host_file(venvs, tmp_path, monkeypatch):
    """Write the file that says where a host's packages are."""

    def write(text: str) -> Path:
        file = tmp_path / "host.yaml"
        file.write_text(text, encoding="utf-8")
        monkeypatch.setenv(interpreters.OF_HOST, str(file))
        return file

    return write


def test_a_host_says_once_where_its_packages_are(host_file, tmp_path):
    """Every config then finds them, and a config's own entry still wins."""
    host_file(
        f"train: {{interpreter: {sys.executable}, pythonpath: [{tmp_path}]}}\nserve: {{interpreter: /no/python}}\n"
    )
    assert interpreters.find("train") == interpreters.Environment("train", Path(sys.executable), (tmp_path,))
    own = interpreters.find("serve", {"serve": Setting(sys.executable)})
    assert own == interpreters.Environment("serve", Path(sys.executable))
    with pytest.raises(EnvironmentMissing, match="the autoawq environment isn't there"):
        interpreters.find("autoawq")


def test_a_hosts_paths_are_meant_from_its_file(host_file, tmp_path, monkeypatch):
    """Whatever folder a command runs in; an interpreter may be left out, or be a command's name."""
    file = host_file("train: {interpreter: ./python, pythonpath: [sites/train]}\nserve: {interpreter: null}\n")
    (file.parent / "python").symlink_to(sys.executable)
    (file.parent / "sites" / "train").mkdir(parents=True)
    monkeypatch.chdir("/")
    found = interpreters.find("train")
    assert found == interpreters.Environment("train", file.parent / "python", (file.parent / "sites" / "train",))
    assert interpreters.of_host()["serve"].interpreter is None


@pytest.mark.parametrize(
    ("text", "key", "allowed"),
    [
        ("control: {}", "control", "train, serve, autoawq, judges"),
        ("train: python3", "train", "the keys interpreter and pythonpath"),
        ("train: {python: python3}", "train", "the keys interpreter and pythonpath"),
        ("train: {interpreter: 3}", "train.interpreter", "a path or a command"),
        ("train: {pythonpath: /site}", "train.pythonpath", "a list of paths"),
        ("- train", interpreters.OF_HOST, "NAME: {interpreter: …, pythonpath: […]}"),
        ("train: {", interpreters.OF_HOST, None),
    ],
)
def test_a_mistake_in_the_hosts_file_names_file_key_and_what_is_allowed(host_file, text, key, allowed):
    """What a config would refuse is refused here too, before anything runs."""
    file = host_file(text)
    with pytest.raises(ConfigError) as caught:
        interpreters.find("train")
    (problem,) = caught.value.problems
    assert (problem.file, problem.key, problem.allowed) == (str(file), key, allowed)
    assert interpreters.OF_HOST in str(problem.remedy)


def test_the_module_costs_little_to_import():
    """`tunegate check` imports it: neither pydantic nor argparse nor a network module comes with it."""
    code = "import sys, pipeline.environments.interpreters; print(*sys.modules)"
    shown = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=interpreters.ROOT, capture_output=True, text=True, check=True
    )
    assert not {"pydantic", "yaml", "argparse", "socket", "asyncio"} & set(shown.stdout.split())


def test_an_environment_of_another_name_is_refused_with_those_there_are():
    """A name that came out of a file is no reason for a traceback."""
    with pytest.raises(EnvironmentMissing) as caught:
        interpreters.find("jugdes")
    assert caught.value.problems[0].allowed == "control, train, serve, autoawq, judges"
