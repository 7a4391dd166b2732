"""MLflow for real: runs, versions, decisions and weights, in SQLite and behind a server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
from support.registered import HARD, a_build, new_home, opened, registered
from support.released import ENVIRONMENT, a_model, write_weights
from support.sample_build import sample_build
from support.wire import answers, free_port, wait_for

from flows.curves import Curves
from pipeline.artifacts import Artifact
from pipeline.config.schema import Config
from pipeline.digests import digest_folder
from pipeline.errors import RegistryError, ReviewError
from pipeline.registry import client as registry_client
from pipeline.registry import runs as registry_runs
from pipeline.registry import versions
from pipeline.registry import weights as registry_weights
from pipeline.registry.client import artifact_uri, asking, local_folder
from pipeline.registry.runs import Point
from pipeline.serving import serve

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


def test_registering_links_the_weights(home, tmp_path):
    """The version's weights are the judged files themselves: one inode, no second copy."""
    build = a_build(tmp_path)
    registered(build)
    released = versions.model_path(versions.versions(NAME)[0])
    assert released.is_relative_to(home / "artifacts" / NAME)
    for file in build.model_path.iterdir():
        assert (released / file.name).stat().st_ino == file.stat().st_ino


def test_weights_are_copied_where_links_are_impossible(home, tmp_path, monkeypatch):
    """On another file system the same bytes are there."""

    def refuse(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(registry_weights.os, "link", refuse)
    build = a_build(tmp_path)
    registered(build)
    copied = versions.model_path(versions.versions(NAME)[0]) / "model.safetensors"
    assert copied.read_bytes() == (build.model_path / "model.safetensors").read_bytes()
    assert copied.stat().st_ino != (build.model_path / "model.safetensors").stat().st_ino


def test_a_unit_of_a_run_is_registered_once(home, tmp_path):
    """Registering again gives the same version; the alias candidate points to the newest."""
    first, second = a_build(tmp_path, 1), a_build(tmp_path, 2)
    assert [registered(first), registered(first), registered(second)] == ["1", "1", "2"]
    newest, older = versions.versions(NAME)
    assert (newest.version, newest.aliases, newest.unit) == ("2", ("candidate",), second.unit)
    assert (older.version, older.aliases, older.build_key) == ("1", (), first.key)
    assert older.model_digest == first.artifacts["quantize"].digest
    assert versions.names() == [NAME]
    assert versions.config_of(newest.run_id).model_dump(mode="json") == second.config


def test_what_did_not_pass_is_not_registered(home, tmp_path):
    """A failing build has a run and no version; nor has one whose verdict is about another unit."""
    failing, other = a_build(tmp_path, 1, policy=HARD), a_build(tmp_path, 2)
    assert failing.verdict.outcome == "fail"
    mixed = other.model_copy(update={"verdict": a_build(tmp_path, 3).verdict})
    for build in (failing, mixed):
        with pytest.raises(RegistryError, match="only a build whose verdict is a pass"):
            versions.register(opened(build), build)
    assert versions.versions(NAME) == []
    assert versions.names() == []


def test_weights_that_changed_since_are_not_registered(home, tmp_path):
    """One byte of difference to what was judged stops the registration and leaves nothing behind."""
    build = a_build(tmp_path)
    run_id = opened(build)
    (build.model_path / "config.json").write_text("{}")
    with pytest.raises(RegistryError, match="changed since it was judged"):
        versions.register(run_id, build)
    assert versions.versions(NAME) == []
    assert list((local_folder(artifact_uri(run_id)) / "models").iterdir()) == []


def another_unit(build, folder, weights):
    """The same build's key, made where the store was empty: its weights came out otherwise."""
    write_weights(folder, weights)
    config = Config.model_validate(build.config)
    unit = serve.served_unit(folder, config.serve, config.name, ENVIRONMENT)
    quantized = build.artifacts["quantize"].model_copy(update={"digest": digest_folder(folder)})
    return build.model_copy(
        update={
            "unit": unit,
            "model_path": folder,
            "artifacts": {**build.artifacts, "quantize": quantized},
            "verdict": build.verdict.model_copy(update={"unit_digest": unit.digest}),
        }
    )


def test_weights_of_another_unit_take_nobodys_place(home, tmp_path):
    """A second unit registered from the same run leaves the approved version's files as they are."""
    build = a_build(tmp_path)
    registered(build)
    versions.decide(NAME, "1", "approved", "tests", "")
    other = another_unit(build, a_model(tmp_path / "elsewhere" / "payload"), "other weights")
    assert versions.register(opened(build), other) == "2"
    for number, made in (("1", build), ("2", other)):
        version = versions.version(NAME, number)
        assert digest_folder(versions.model_path(version)) == version.model_digest
        assert version.model_digest == made.artifacts["quantize"].digest
    assert versions.release(NAME, "1").unit == build.unit


def test_a_changed_store_leaves_registered_weights_alone(home, tmp_path):
    """Whether the refused weights are another version's or this one's: what is served stays."""
    build = a_build(tmp_path)
    registered(build)
    served = versions.model_path(versions.version(NAME, "1"))
    weights = build.model_path / "model.safetensors"
    judged = weights.read_bytes()
    weights.unlink()
    weights.write_bytes(judged + b"x")
    unit = build.unit.model_copy(update={"vllm_version": "9"})
    verdict = build.verdict.model_copy(update={"unit_digest": unit.digest})
    run_id = opened(build)
    assert versions.register(run_id, build.model_copy(update={"unit": unit, "verdict": verdict})) == "2"
    with pytest.raises(RegistryError, match="changed since it was judged"):
        versions.register(run_id, another_unit(build, build.model_path, "judged").model_copy(
            update={"model_path": a_model(tmp_path / "elsewhere" / "payload")}
        ))  # fmt: skip
    assert (served / "model.safetensors").read_bytes() == judged
    assert [folder for folder in served.parent.iterdir() if folder != served] == []


def test_damaged_weights_are_put_right(home, tmp_path):
    """A folder that isn't what its name says gives way to the judged files, in one step."""
    build = a_build(tmp_path)
    run_id = opened(build)
    place, digest = registry_weights.put(run_id, build)
    folder = local_folder(artifact_uri(run_id)) / place
    (folder / "config.json").unlink()
    assert registry_weights.put(run_id, build) == (place, digest)
    assert digest_folder(folder) == digest
    assert [beside.name for beside in folder.parent.iterdir()] == [digest]


def test_versions_from_before_keep_their_weights_place(home, tmp_path):
    """A version without the tag of its place has its weights under `model`; a new unit of its run lies beside them."""
    build = a_build(tmp_path)
    registered(build)
    found = versions.version(NAME, "1")
    before = versions.model_path(found).rename(local_folder(artifact_uri(found.run_id)) / "model")
    with asking() as client:
        client.delete_model_version_tag(NAME, "1", versions.PLACE)
    other = another_unit(build, a_model(tmp_path / "elsewhere" / "payload"), "other weights")
    versions.register(opened(build), other)
    assert versions.model_path(versions.version(NAME, "1")) == before
    assert digest_folder(before) == found.model_digest


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


def test_an_approval_names_the_digest(home, tmp_path):
    """An approved version is a release with the unit that was judged; candidate points to it no more."""
    build = a_build(tmp_path)
    registered(build)
    with pytest.raises(ReviewError, match="waiting for review") as refused:
        versions.release(NAME)
    assert refused.value.problems[0].remedy == "tunegate review tickets"
    made = versions.decide(NAME, "1", "approved", " tests ", "good enough")
    assert (made.reviewer, made.unit_digest) == ("tests", build.unit.digest)
    release = versions.release(NAME)
    assert (release.version, release.unit, release.approval) == ("1", build.unit, made)
    assert versions.versions(NAME)[0].aliases == ()
    assert versions.waiting(NAME) == []


def test_a_rejection_takes_an_approval_back(home, tmp_path):
    """The newest decision counts; the earlier ones can still be read in the version's tags."""
    registered(a_build(tmp_path))
    versions.decide(NAME, "1", "approved", "tests", "")
    versions.decide(NAME, "1", "rejected", "Grace", "wrong data")
    with pytest.raises(ReviewError, match="rejected by Grace: wrong data"):
        versions.release(NAME)
    with asking() as client:
        tags = client.get_model_version(NAME, "1").tags
    kept = [json.loads(value) for key, value in sorted(tags.items()) if key.startswith(f"{versions.DECISION}.")]
    assert [(decision["reviewer"], decision["decision"]) for decision in kept] == [
        ("tests", "approved"),
        ("Grace", "rejected"),
    ]


def test_the_newest_approved_version_is_released(home, tmp_path):
    """A newer version that waits, or was rejected, doesn't hide an approved one."""
    for number in (1, 2, 3):
        registered(a_build(tmp_path, number))
    versions.decide(NAME, "1", "approved", "tests", "")
    versions.decide(NAME, "2", "rejected", "tests", "worse")
    assert versions.release(NAME).version == "1"
    assert [version.version for version in versions.waiting(NAME)] == ["3"]


@pytest.mark.parametrize(
    ("number", "decision", "reviewer", "reason", "said"),
    [
        ("9", "approved", "tests", "", "version 9 is not registered"),
        ("1", "approved", "  ", "", "a decision needs a reviewer"),
        ("1", "rejected", "tests", " ", "a rejection needs a reason"),
        ("1", "approved", "tests", "x" * 2001, "the reason has 2001 characters"),
    ],
)
def test_a_decision_that_can_not_be(home, tmp_path, number, decision, reviewer, reason, said):
    """Unknown version, no reviewer, a rejection without a reason: refused with a remedy, nothing written."""
    registered(a_build(tmp_path))
    with pytest.raises(ReviewError, match=said) as refused:
        versions.decide(NAME, number, decision, reviewer, reason)
    assert refused.value.problems[0].remedy
    assert versions.versions(NAME)[0].approval is None


def test_what_no_longer_passes_is_not_approved(home, tmp_path):
    """Judged again with another outcome, the waiting version can't be approved any more."""
    build = a_build(tmp_path)
    registered(build)
    run_id = versions.versions(NAME)[0].run_id
    versions.note_verdict(run_id, build.model_copy(update={"verdict": a_build(tmp_path, 2, policy=HARD).verdict}))
    with pytest.raises(ReviewError, match="newest verdict on version 1 is fail"):
        versions.decide(NAME, "1", "approved", "tests", "")


def test_what_passes_again_can_be_approved(home, tmp_path):
    """After a pass, another outcome and a pass, the newest counts."""
    build = a_build(tmp_path)
    registered(build)
    run_id = versions.versions(NAME)[0].run_id
    versions.note_verdict(run_id, build.model_copy(update={"verdict": a_build(tmp_path, 2, policy=HARD).verdict}))
    assert versions.version(NAME, "1").verdict == "fail"
    assert versions.register(run_id, build) == "1"
    assert versions.decide(NAME, "1", "approved", "tests", "").decision == "approved"


def test_an_approval_is_void_when_the_unit_changes(home, tmp_path):
    """An approval of one digest releases no other."""
    build = a_build(tmp_path)
    registered(build)
    versions.decide(NAME, "1", "approved", "tests", "")
    with asking() as client:
        changed = build.unit.model_copy(update={"flags": ("--max-model-len=4096",)})
        client.set_model_version_tag(NAME, "1", versions.UNIT, changed.model_dump_json())
    with pytest.raises(ReviewError, match="names another served unit"):
        versions.release(NAME)


def test_there_is_one_champion_at_most(home, tmp_path):
    """The alias moves; what it points to is found with its weights, even after a rejection."""
    for number in (1, 2):
        registered(a_build(tmp_path, number))
        versions.decide(NAME, str(number), "approved", "tests", "")
    assert versions.champion(NAME) is None
    versions.set_champion(NAME, "1")
    versions.set_champion(NAME, "2")
    assert [version.version for version in versions.versions(NAME) if "champion" in version.aliases] == ["2"]
    versions.decide(NAME, "2", "rejected", "tests", "seen a bug")
    assert versions.champion(NAME).version == "2"
    assert versions.champion("never-registered") is None


@pytest.mark.parametrize(
    ("how", "said"),
    [("undecided", "version 1, which nobody decided on"), ("newer", "version 1, whose tags can't be read")],
)
def test_a_champion_that_is_none_is_not_passed_over(home, tmp_path, how, said):
    """An alias set by hand, or a newer tunegate's tags: the gate must not take it for no champion at all."""
    build = a_build(tmp_path)
    registered(build)
    if how == "newer":
        versions.decide(NAME, "1", "approved", "tests", "")
        with asking() as client:
            newer = {**json.loads(build.unit.model_dump_json()), "a_new_field": 1}
            client.set_model_version_tag(NAME, "1", versions.UNIT, json.dumps(newer))
    versions.set_champion(NAME, "1")
    with pytest.raises(RegistryError, match=said) as refused:
        versions.champion(NAME)
    assert "tunegate promote tickets --version N" in refused.value.problems[0].remedy


def test_a_version_that_can_not_be_read_is_left_out(home, tmp_path, caplog):
    """Tags edited by hand hide that version alone, and the log says so."""
    for number in (1, 2):
        registered(a_build(tmp_path, number))
    with asking() as client:
        client.set_model_version_tag(NAME, "1", versions.UNIT, "{}")
    assert [version.version for version in versions.versions(NAME)] == ["2"]
    assert "tickets version 1" in caplog.text


def test_lost_weights_are_named(home, tmp_path):
    """A release whose folder is gone says where it was."""
    registered(a_build(tmp_path))
    found = versions.versions(NAME)[0]
    lost = versions.model_path(found)
    lost.rename(tmp_path / "elsewhere")
    with pytest.raises(RegistryError, match="not on this machine") as error:
        versions.model_path(found)
    assert error.value.problems[0].file == str(lost)


def test_a_deleted_experiment_is_named(home):
    """A build into an experiment that somebody deleted says how to get it back."""
    run_id = registry_runs.open_run(NAME, "f" * 32, {})
    with asking() as client:
        client.delete_experiment(client.get_run(run_id).info.experiment_id)
    with pytest.raises(RegistryError, match="was deleted") as error:
        registry_runs.open_run(NAME, "f" * 32, {})
    assert "mlflow experiments restore" in error.value.problems[0].remedy


def test_decisions_at_the_same_moment_leave_one(home, tmp_path):
    """Two reviewers who press at once leave one decision that counts, and both in the tags."""
    registered(a_build(tmp_path))
    people = ["tests", "Grace", "Edsger", "Barbara"]
    threads = [threading.Thread(target=versions.decide, args=(NAME, "1", "approved", who, "")) for who in people]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert versions.release(NAME).approval.reviewer in people
    with asking() as client:
        tags = client.get_model_version(NAME, "1").tags
    assert sum(key.startswith(f"{versions.DECISION}.") for key in tags) == len(people)


def test_pages(home, tmp_path):
    """Without a server the page is a file; with MLflow's UI it is the version's or the run's address."""
    build = a_build(tmp_path)
    registered(build)
    run_id = versions.versions(NAME)[0].run_id
    registry_runs.record_build(run_id, build)
    assert Path(versions.page(NAME, "1", run_id)).name == "report.html"
    assert Path(versions.page(NAME, "1", run_id)).is_file()
    (home / "services").mkdir()
    (home / "services" / "mlflow-url").write_text("http://127.0.0.1:5000")
    assert versions.page(NAME, "1", run_id) == "http://127.0.0.1:5000/#/models/tickets/versions/1"
    assert versions.page(NAME, None, run_id).endswith(f"/runs/{run_id}")


def test_curves_do_not_wait_for_mlflow(home, monkeypatch):
    """Five hundred steps reach MLflow whole, in a few requests."""
    run_id = registry_runs.open_run(NAME, "1" * 32, {})
    requests = []
    send = registry_runs.log_points
    monkeypatch.setattr(
        registry_runs, "log_points", lambda run, points: (requests.append(len(points)), send(run, points))
    )
    curves = Curves(run_id, pytest.fail)
    started = time.monotonic()
    for step in range(500):
        curves.add("loss", 1.0 / (step + 1), step)
        curves.add("tokens_per_second", 200.0, step)
    adding = time.monotonic() - started
    curves.flush()
    with asking() as client:
        assert len(client.get_metric_history(run_id, "loss")) == 500
    assert sum(requests) == 1000
    assert len(requests) <= 2 + adding / 5


def test_curves_wait_for_an_mlflow_that_is_away(home, monkeypatch):
    """A server that is away costs one message; the points are sent when it is back."""
    run_id = registry_runs.open_run(NAME, "2" * 32, {})
    told = []
    curves = Curves(run_id, told.append)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    curves.add("loss", 0.5, 1)
    curves.add("loss", 0.4, 2)
    assert len(told) == 1
    assert told[0].startswith("1 points of the curves wait for MLflow: MLflow did not answer")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    curves.flush()
    with asking() as client:
        assert [point.value for point in client.get_metric_history(run_id, "loss")] == [0.5, 0.4]


def test_a_server_that_is_away_is_named_without_its_password(home, monkeypatch):
    """The error says where MLflow was looked for and what to do, and prints no password."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://ada:secret@127.0.0.1:9")
    with pytest.raises(RegistryError, match="MLflow did not answer") as error:
        versions.versions(NAME)
    assert error.value.problems[0].file == "http://127.0.0.1:9"
    assert "MLFLOW_TRACKING_URI" in error.value.problems[0].remedy
    assert "secret" not in str(error.value)


@pytest.fixture
def server(tmp_path, monkeypatch, home):
    """An MLflow server of the test's own that proxies artifacts."""
    port, store = free_port(), tmp_path / "server"
    store.mkdir()
    (store / "mlflow.db").write_bytes((home / "mlflow.db").read_bytes())
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{store}/mlflow.db",
               "--serve-artifacts", "--artifacts-destination", (store / "artifacts").as_uri(),
               "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]  # fmt: skip
    with (store / "log").open("w") as log:
        child = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: answers(f"{url}/health"), 120)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
        yield url
    finally:
        os.killpg(child.pid, 15)
        child.wait()


@pytest.mark.slow
def test_the_whole_way_through_a_server(server, tmp_path, home):
    """Over HTTP: the run, the uploaded weights, the decision, the download with its digest, the page."""
    build = a_build(tmp_path)
    registry_runs.record_build(opened(build), build)
    assert [registered(build), registered(build)] == ["1", "1"]
    found = versions.versions(NAME)[0]
    assert artifact_uri(found.run_id).startswith("mlflow-artifacts:")
    versions.decide(NAME, "1", "approved", "tests", "")
    release = versions.release(NAME)
    assert release.model_path == home / "work" / "releases" / found.model_digest
    for file in build.model_path.iterdir():
        assert (release.model_path / file.name).read_bytes() == file.read_bytes()
    assert versions.config_of(found.run_id).model_dump(mode="json") == build.config
    assert registry_runs.refresh(found.run_id, {**build.config, "promote": {"port": 9999}}) == ("promote",)
    assert versions.config_of(found.run_id).promote.port == 9999
    versions.set_champion(NAME, "1")
    assert versions.champion(NAME).version == "1"
    assert versions.page(NAME, "1", found.run_id) == f"{server}/#/models/tickets/versions/1"
    assert (
        httpx.get(
            f"{server}/get-artifact", params={"path": "verdict.json", "run_uuid": found.run_id}, timeout=30
        ).json()["outcome"]
        == "pass"
    )
    (release.model_path / "config.json").unlink()
    (release.model_path).rename(tmp_path / "broken")
    with asking() as client:
        (tmp_path / "config.json").write_text("{}")
        client.log_artifact(found.run_id, str(tmp_path / "config.json"), found.place)
    with pytest.raises(RegistryError, match="has the digest"):
        versions.release(NAME)


def test_the_first_question_makes_the_database(tmp_path, monkeypatch):
    """Whether MLflow's tables must be made first is known before they are, so that a person can be told."""
    monkeypatch.setenv("TUNEGATE_HOME", str(tmp_path / "fresh"))
    assert registry_client.is_new()
    new_home(tmp_path, monkeypatch)
    assert not registry_client.is_new()
