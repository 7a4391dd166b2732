"""The deployments of a config; a real server and a cluster's manifests are test_services' and test_manifests' business."""

from __future__ import annotations

from pathlib import Path

import pytest

from flows import deployments


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config without a schedule."""
    monkeypatch.setenv("TUNEGATE_HOME", str(tmp_path / "home"))
    made = tmp_path / "use.yaml"
    made.write_text("name: letters\ndatasets: [{path: rows.jsonl}]\n")
    return made


def test_deployments_have_the_configs_name_and_absolute_paths(file: Path, tmp_path: Path) -> None:
    """A run of Prefect's worker starts in another folder; a promotion takes the name alone."""
    entries = {entry["entrypoint"]: entry for entry in deployments.rendered(file, tmp_path)["deployments"]}
    assert {entry["name"] for entry in entries.values()} == {"letters"}
    paths = {"config": str(file), "data_dir": str(tmp_path)}
    assert entries["flows/build.py:build"]["parameters"] == paths
    assert entries["flows/promote.py:promote"]["parameters"] == {"name": "letters"}


@pytest.mark.parametrize("cron", [None, "5 4 * * 1"])
def test_a_schedule_of_the_config_replaces_the_sleeping_one(file: Path, tmp_path: Path, cron: str | None) -> None:
    """Without one, prefect.yaml's stays as it is: switched off."""
    if cron:
        file.write_text(file.read_text() + f"schedule: {{cron: '{cron}', timezone: Europe/Berlin}}\n")
    entries = deployments.rendered(file, tmp_path)["deployments"]
    ((schedule,),) = (entry["schedules"] for entry in entries if "schedules" in entry)
    assert schedule["active"] is bool(cron)
    if cron:
        assert (schedule["cron"], schedule["timezone"]) == (cron, "Europe/Berlin")


def test_a_cluster_runs_builds_and_no_promotion(file: Path) -> None:
    """A promotion puts vLLM behind Caddy on the machine that it runs on."""
    entries = deployments.rendered_for_cluster(file, None)["deployments"]
    assert [entry["entrypoint"] for entry in entries] == ["flows/build.py:build", "flows/retrain.py:retrain"]
    assert {entry["work_pool"]["name"] for entry in entries} == {deployments.cluster_pool("letters")}
    assert {entry["parameters"]["config"] for entry in entries} == {"/config/letters.yaml"}
