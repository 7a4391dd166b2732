"""The table of runtimes: its keys are the config's allowed values, and every entry can do what is asked of a runtime."""

from __future__ import annotations

import inspect
import subprocess
import sys
import typing
from pathlib import Path

import pytest
from support.released import FAKE_SITE, a_config
from support.sample_build import sample_build

from pipeline.artifacts import RuntimeName, ServedUnit
from pipeline.config.schema import ServeConfig
from pipeline.environments import install, interpreters
from pipeline.plan import doctor, plan
from pipeline.report import facts
from pipeline.serving import runtimes
from pipeline.serving.runtimes import RUNTIMES, Operations
from pipeline.serving.server import Server

ROOT = Path(__file__).parents[3]
OPERATIONS = [name for name in vars(Operations) if not name.startswith("_")]


def config_of(runtime):
    """A resolved config with this runtime; where it needs an image, it has one."""
    serve = {"runtime": runtime, "image": "vllm@sha256:" + "0" * 64}
    environments = {"serve": {"interpreter": sys.executable, "pythonpath": [str(FAKE_SITE)]}}
    return a_config(serve=serve, environments=environments).model_dump(mode="json")


@pytest.mark.parametrize("record", [ServeConfig, ServedUnit, Server])
def test_the_allowed_values_are_the_tables_keys(record):
    """A config, a unit and a server name a runtime by the same words, and each of them is in the table."""
    allowed = typing.get_args(record.model_fields["runtime"].annotation)
    assert set(allowed) == set(RUNTIMES) == set(typing.get_args(RuntimeName))


@pytest.mark.parametrize("name", RUNTIMES)
def test_a_runtimes_file_has_every_operation(name):
    """Each function takes as many arguments as `Operations` says."""
    operations = RUNTIMES[name].operations()
    assert OPERATIONS == ["identity", "spawn", "stop", "is_alive", "condition", "raise_if_dead", "refresh_log"]
    for operation in OPERATIONS:
        expected = inspect.signature(getattr(Operations, operation)).parameters
        assert len(inspect.signature(getattr(operations, operation)).parameters) == len(expected) - 1, operation


@pytest.mark.parametrize("name", RUNTIMES)
def test_a_load_test_is_a_program_of_an_environment_that_is_there(name):
    """The program is a file of the evaluation, and its environment is one that can be made."""
    loadtest = RUNTIMES[name].loadtest
    assert ROOT.joinpath(*loadtest.program.split(".")).with_suffix(".py").is_file()
    assert loadtest.environment in interpreters.NAMES


def test_a_load_test_in_a_container_is_told_which():
    """The judged image and the container's settings; a process needs neither."""
    serve = {"container": {"user": "1:1"}}
    assert RUNTIMES["docker"].loadtest.settings("sha256:1", serve) == {
        "image": "sha256:1",
        "container": {"user": "1:1"},
    }
    assert RUNTIMES["process"].loadtest.settings("d", serve) == {}


@pytest.mark.parametrize("name", RUNTIMES)
def test_the_plan_counts_packages_where_an_environment_has_vllm(name):
    """Where the runtime brings its own vLLM, the config names it already and no environment is looked for."""
    config = config_of(name)
    environment = runtimes.environment_of(config)
    assert (environment is None) is (RUNTIMES[name].environment is None)
    assert ("packages" in plan.served_by(config)) is (environment is not None)


@pytest.mark.parametrize("name", RUNTIMES)
def test_doctor_needs_what_the_runtime_needs(name):
    """An engine or an environment with vLLM, never what another runtime would need."""
    findings = {finding.name: finding for finding in doctor.doctor(runtime=name)}
    assert findings["container engine"].needed is RUNTIMES[name].needs_container_engine
    assert "serve" in install.DEFAULT
    assert findings["environment serve"].needed is (RUNTIMES[name].environment == "serve")


@pytest.mark.parametrize("name", RUNTIMES)
def test_the_report_names_the_runtime(name, tmp_path):
    """As the table's key, with the digest of what is installed there."""
    build = sample_build(tmp_path)
    unit = build.unit.model_copy(update={"runtime": name, "runtime_digest": "of-what-is-there"})
    assert ("runtime", f"{name}, of-what-is-there") in facts.serving_facts(build.model_copy(update={"unit": unit}))


def test_the_table_is_read_on_the_standard_library():
    """`tunegate check` reads it: neither a runtime nor what it needs is imported."""
    code = (
        "import sys; from pipeline.serving.runtimes import RUNTIMES; assert RUNTIMES\n"
        "print([name for name in ('docker', 'httpx', 'pydantic', 'vllm', 'pipeline.serving.process') if name in sys.modules])"
    )
    child = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert child.stdout == "[]\n"
