"""Which packages each environment of a host without virtual environments gets."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from gpu import gpu_host, gpu_host_sites

from pipeline.environments import interpreters


def test_each_environment_is_completed_by_its_sites_in_order(tmp_path):
    """The train environment's compressed-tensors is the quantizer's; what is found there is what tunegate finds."""
    for site in ("control", "serve", "quantize"):
        (tmp_path / "sites" / site).mkdir(parents=True)
    (tmp_path / "sites" / "control" / ".data" / "scripts").mkdir(parents=True)
    caddy = tmp_path / "sites" / "control" / ".data" / "scripts" / "caddy"
    caddy.touch(0o644)
    options = gpu_host.parsed(["--sites", str(tmp_path / "sites"), "--python", sys.executable, "--only", "tests"])
    host = gpu_host_sites.host_of(options, tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(interpreters.OF_HOST, host.further[interpreters.OF_HOST])
        patch.setenv("TUNEGATE_VENVS", host.further["TUNEGATE_VENVS"])
        found = {name: interpreters.find(name) for name in gpu_host_sites.SITES}
    assert {environment.interpreter for environment in found.values()} == {Path(sys.executable)}
    names = {name: [site.name for site in environment.pythonpath] for name, environment in found.items()}
    assert names == {
        "train": ["quantize", "serve", "control"],
        "serve": ["serve"],
        "autoawq": ["serve"],
        "judges": ["control"],
    }
    assert host.environ("tests")["PYTHONPATH"].split(os.pathsep)[:2] == [
        str(gpu_host_sites.ROOT),
        str(tmp_path / "sites" / "control"),
    ]
    assert os.access(caddy, os.X_OK)


def test_each_part_has_a_store_of_its_own(monkeypatch):
    """What one part stops isn't another's, and nothing reaches a registry that the caller's shell names."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://registry")
    host = gpu_host_sites.Host({}, {"control": []}, {"A": "b"})
    environ = host.at(Path("/home/chain")).environ("control")
    assert (environ["TUNEGATE_HOME"], environ["A"]) == ("/home/chain", "b")
    assert "MLFLOW_TRACKING_URI" not in environ
