"""The MLflow run of a build: found again, described once, with the pages for a reviewer."""

from __future__ import annotations

import json

import pytest
from support.registered import a_build, new_home, opened, registered
from support.sample_build import sample_build

from pipeline.artifacts import Artifact
from pipeline.errors import RegistryError
from pipeline.registry import runs as registry_runs
from pipeline.registry import versions
from pipeline.registry.client import artifact_uri, asking, local_folder
from pipeline.registry.runs import Point

NAME = "tickets"


@pytest.fixture
def home(tmp_path, monkeypatch):
    return new_home(tmp_path, monkeypatch)


def run_of(run_id):
    """What MLflow holds of a run."""
    with asking() as client:
        return client.get_run(run_id)


def test_a_build_has_one_run(home):
    """Opening a build's run again finds it, running, with the config as parameters and as a file."""
    config = {"name": NAME, "finetune": {"lora_r": 16, "targets": ["q", "v"]}, "long": "x" * 9000}
    first = registry_runs.open_run(NAME, "a" * 32, config)
    registry_runs.close_run(first, "FAILED")
    assert run_of(first).info.status == "FAILED"
    assert registry_runs.open_run(NAME, "a" * 32, config) == first
    assert registry_runs.open_run(NAME, "b" * 32, config) != first
    run = run_of(first)
    assert run.info.status == "RUNNING"
    assert run.data.params["finetune.lora_r"] == "16"
    assert json.loads(run.data.params["finetune.targets"]) == ["q", "v"]
    assert len(run.data.params["long"]) == registry_runs.PARAM_LENGTH
    assert json.loads(registry_runs.read_text(first, "config.json")) == config


def test_what_is_not_judged_is_taken_over_by_the_same_build(home, tmp_path):
    """Another port reaches the next promotion; the settings that were judged stay, whatever the config says."""
    build = a_build(tmp_path)
    run_id = versions.version(NAME, registered(build)).run_id
    judged = versions.config_of(run_id)
    moved = {**build.config["promote"], "port": 9999}
    changed = {**build.config, "promote": moved, "serve": {**build.config["serve"], "max_model_len": 99}}
    assert registry_runs.open_run(NAME, build.key, changed) == run_id
    now = versions.config_of(run_id)
    assert now.promote.port == 9999
    assert now == judged.model_copy(update={"promote": now.promote})
    assert registry_runs.refresh(run_id, changed) == ()


def test_a_lost_config_is_written_again_by_the_same_build(home, tmp_path):
    """Else the command that the error names would meet the same error."""
    build = a_build(tmp_path)
    run_id = versions.version(NAME, registered(build)).run_id
    judged = versions.config_of(run_id)
    (local_folder(artifact_uri(run_id)) / "config.json").unlink()
    with pytest.raises(RegistryError, match="tunegate run CONFIG"):
        versions.config_of(run_id)
    opened(build)
    assert versions.config_of(run_id) == judged


def test_a_run_whose_description_was_cut_short_is_completed(home):
    """After kill -9 between the run's start and its parameters the next build writes them."""
    with asking() as client:
        experiment = client.create_experiment(NAME, (home / "artifacts" / NAME).as_uri())
        killed = client.create_run(experiment, tags={registry_runs.BUILD: "c" * 32}).info.run_id
    assert registry_runs.open_run(NAME, "c" * 32, {"seed": 42}) == killed
    assert run_of(killed).data.params == {"seed": "42"}


def test_more_parameters_and_points_than_a_batch_takes(home):
    """MLflow's limits on a request and on names are kept, whatever the numbers are called."""
    run_id = registry_runs.open_run(NAME, "d" * 32, {f"key{n}": n for n in range(250)})
    assert len(run_of(run_id).data.params) == 250
    registry_runs.log_points(run_id, [Point("loss (train) %", 1 / step, step, step) for step in range(1, 2501)])
    with asking() as client:
        history = client.get_metric_history(run_id, "loss _train_ _")
    assert [point.step for point in history] == list(range(1, 2501))
    assert history[-1].value == 1 / 2500


def test_a_stage_is_recorded_once(home, tmp_path):
    """Digest and words become tags, numbers metrics, plots files; the same artefact isn't recorded twice."""
    extra = tmp_path / "made" / "extra"
    extra.mkdir(parents=True)
    (extra / "loss.png").write_bytes(b"png")
    detail = {"steps": 3, "loss": {"train": 0.5, "eval": None}, "source": "a" * 9000, "names": ["x"]}
    artifact = Artifact(stage="finetune", key="k" * 32, path=tmp_path / "made", digest="e" * 64, parents={},
                        made_by={"torch": "2"}, detail=detail)  # fmt: skip
    run_id = registry_runs.open_run(NAME, "e" * 32, {})
    for _ in range(2):
        registry_runs.log_artifact(run_id, artifact)
    data = run_of(run_id).data
    assert data.metrics == {"finetune/steps": 3.0, "finetune/loss.train": 0.5}
    assert data.tags["tunegate.finetune.digest"] == "e" * 64
    assert len(data.tags["tunegate.finetune.source"]) == registry_runs.TAG_LENGTH
    with asking() as client:
        assert len(client.get_metric_history(run_id, "finetune/steps")) == 1
        assert [file.path for file in client.list_artifacts(run_id, "finetune")] == ["finetune/loss.png"]


def test_a_build_is_recorded_for_its_reviewer(home, tmp_path):
    """The run has the page, the card, the verdict, per-item results, plots, numbers with intervals."""
    build = sample_build(tmp_path, count=120)
    run_id = opened(build)
    registry_runs.record_build(run_id, build)
    data = run_of(run_id).data
    assert data.tags[registry_runs.VERDICT] == build.verdict.outcome
    assert data.tags[registry_runs.UNIT_DIGEST] == build.unit.digest
    assert data.tags["mlflow.note.content"].startswith("# tickets")
    score = build.evaluations["candidate"].metrics["exact_match"]
    assert data.metrics["candidate/exact_match"] == score.value
    assert data.metrics["candidate/exact_match_low"] == score.low
    with asking() as client:
        steps = [point.step for point in client.get_metric_history(run_id, "candidate/p50_ttft_ms")]
    assert steps == [1, 8]
    folder = local_folder(artifact_uri(run_id))
    lines = (folder / "evaluations" / "candidate.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == [item.id for item in build.evaluations["candidate"].items]
    assert json.loads((folder / "verdict.json").read_text()) == json.loads(build.verdict.model_dump_json())
    assert "<html" in (folder / "report.html").read_text()
    assert json.loads((folder / "report.json").read_text())["unit"] == build.unit.digest
    assert (folder / "model_card.md").is_file()
    assert list((folder / "plots").glob("*.png"))


MADE = {"merge": "1" * 64, "quantize": "2" * 64}


def recorded(key, made, unit):
    """A build's run of that unit, with the marks of its artefacts, and as it ended."""
    run_id = registry_runs.open_run(NAME, key, {"seed": 42}, made)
    own = registry_runs.run_of_unit(run_id, NAME, key, {"seed": 42}, unit)
    with asking() as client:
        for stage, digest in made.items():
            client.set_tag(own, f"tunegate.{stage}.digest", digest)
    registry_runs.close_run(own, "FINISHED")
    return own


def test_each_unit_of_a_build_has_its_run(home):
    """The same artefacts served otherwise, or others under the same key, are recorded apart; each is found again."""
    key, other = "a" * 32, MADE | {"quantize": "3" * 64}
    first = recorded(key, MADE, "unit 1")
    runs = [first, recorded(key, MADE, "unit 2"), recorded(key, other, "unit 3")]
    assert len(set(runs)) == 3
    assert [recorded(key, made, f"unit {n}") for n, made in ((1, MADE), (2, MADE), (3, other))] == runs
    assert [run_of(run_id).data.tags[registry_runs.UNIT_DIGEST] for run_id in runs] == ["unit 1", "unit 2", "unit 3"]
    assert {run_of(run_id).data.params["seed"] for run_id in runs} == {"42"}
    assert {run_of(run_id).info.status for run_id in runs} == {"FINISHED"}


def test_what_is_made_anew_starts_a_run_and_goes_on_in_it(home):
    """A unit's run isn't written over by a build that may come out otherwise; killed, that build finds its own again."""
    key, nothing = "b" * 32, dict.fromkeys(MADE)
    first = recorded(key, MADE, "unit 1")
    again = registry_runs.open_run(NAME, key, {"seed": 42}, nothing)
    assert again != first
    assert registry_runs.open_run(NAME, key, {"seed": 42}, nothing) == again
    assert registry_runs.run_of_unit(again, NAME, key, {"seed": 42}, "unit 2") == again
    assert run_of(first).info.status == "FINISHED"


def test_a_unit_that_came_out_the_same_goes_on_in_its_run(home):
    """The same bytes made again are the same version's; the run that was opened for them says where they are."""
    key = "c" * 32
    first = recorded(key, MADE, "unit 1")
    again = registry_runs.open_run(NAME, key, {"seed": 42}, dict.fromkeys(MADE))
    assert registry_runs.run_of_unit(again, NAME, key, {"seed": 42}, "unit 1") == first
    assert (run_of(first).info.status, run_of(again).info.status) == ("RUNNING", "FINISHED")
    assert first in run_of(again).data.tags["mlflow.note.content"]
    assert registry_runs.open_run(NAME, key, {"seed": 42}, MADE) == first


def test_a_deleted_experiment_is_named(home):
    """A build into an experiment that somebody deleted says how to get it back."""
    run_id = registry_runs.open_run(NAME, "f" * 32, {})
    with asking() as client:
        client.delete_experiment(client.get_run(run_id).info.experiment_id)
    with pytest.raises(RegistryError, match="was deleted") as error:
        registry_runs.open_run(NAME, "f" * 32, {})
    assert "mlflow experiments restore" in error.value.problems[0].remedy
