"""Versions and decisions in a real MLflow, in SQLite and behind a server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest
from support.registered import HARD, a_build, new_home, opened, registered
from support.wire import answers, free_port, wait_for

from pipeline.errors import RegistryError, ReviewError
from pipeline.registry import runs as registry_runs
from pipeline.registry import versions
from pipeline.registry.client import artifact_uri, asking

NAME = "tickets"


@pytest.fixture
def home(tmp_path, monkeypatch):
    return new_home(tmp_path, monkeypatch)


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
