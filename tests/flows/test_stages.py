"""What a stage is handed."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
from fakes import fake_smi
from support.released import a_config

from flows import stages
from pipeline import program, store
from pipeline.artifacts import Artifact
from pipeline.environments import interpreters
from pipeline.errors import Busy, StageFailed
from pipeline.kubernetes import manifests


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Artifact]:
    """Two artefacts in a store."""
    monkeypatch.setenv("TUNEGATE_HOME", str(tmp_path / "home"))
    found = {}
    for stage, name in (("prepare", "calibration.jsonl"), ("merge", "model.safetensors")):
        with store.making(stage, "k") as partial:
            (partial / "payload").mkdir()
            (partial / "payload" / name).write_text("one two three\n")
            found[stage] = store.finish(stage, "k", partial, parents={}, made_by={}, detail={})
    return found


def test_inputs_are_handed_on_as_they_were_made(made: dict[str, Artifact]) -> None:
    """Asked once and again, as the second time digests are remembered."""
    for _ in range(2):
        assert stages.inputs_json(made, ("merge", "prepare"))["merge"] == made["merge"].model_dump(mode="json")


def test_a_stage_sees_no_secret_but_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also one whose variable isn't called like a secret, as the config says that it is one."""
    judge = {"base_url": "http://127.0.0.1:9/v1", "model": "m", "api_key_env": "JUDGE_KEY"}
    config = a_config(evaluate={"judges": [judge]}, notify={"webhook_env": "HOOK"})
    code = "import json, os; print(json.dumps({'event': 'message', 'text': ' '.join(os.environ)}))"
    monkeypatch.setattr(interpreters, "command", lambda found, _module: [str(found.interpreter), "-c", code])
    for name in ("JUDGE_KEY", "HOOK", "PLAIN"):
        monkeypatch.setenv(name, "x")
    said: list[str] = []
    for keep, seen in (((), {"PLAIN"}), (("JUDGE_KEY",), {"PLAIN", "JUDGE_KEY"})):
        said.clear()
        with pytest.raises(StageFailed):  # it says its environment and leaves no result
            stages.run_program(
                "evaluate", "control", config, program.Request({}, {}, tmp_path / "work"),
                lambda event: said.append(str(event.get("text"))), keep=keep,
            )  # fmt: skip
        assert {"JUDGE_KEY", "HOOK", "PLAIN"} & set(" ".join(said).split()) == seen


@pytest.mark.parametrize("change", ["shuffled", "one file more", "a file gone"])
def test_an_input_that_changed_since_stops_the_stage(made: dict[str, Artifact], change: str) -> None:
    """A calibration set that was shuffled in the store is refused before the quantizer sees it, with the way out."""
    stages.inputs_json(made, ("merge", "prepare"))
    file = made["prepare"].payload / "calibration.jsonl"
    if change == "shuffled":
        file.write_text("three one two\n")
    elif change == "one file more":
        file.with_name("more.jsonl").write_text("")
    else:
        file.unlink()
    assert "merge" in stages.inputs_json(made, ("merge",))
    with pytest.raises(StageFailed, match="prepare artefact was changed") as error:
        stages.inputs_json(made, ("merge", "prepare"))
    assert f"rm -r {made['prepare'].path}" in str(error.value)


@pytest.mark.parametrize("in_a_pod", [True, False])
def test_flows_in_pods_do_not_wait_for_each_others_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_a_pod: bool
) -> None:
    """Each has its own, though their locks lie on one volume; on a machine there is one slot."""
    monkeypatch.setenv("TUNEGATE_HOME", str(tmp_path / "home"))
    fake_smi.install(monkeypatch, tmp_path, 70000)
    if in_a_pod:
        monkeypatch.setenv(manifests.CLAIM, "tunegate")
    with (
        stages.device_slot(lambda _event: None),
        nullcontext() if in_a_pod else pytest.raises(Busy),
        store.lock("gpu", wait=False),
    ):
        pass


def test_who_holds_a_gpu_is_said_before_a_stage_takes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only where it is much: a stage on a free GPU, or on a CPU, hears nothing."""
    monkeypatch.setenv("TUNEGATE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(stages, "GIVEN_BACK_S", 0.0)
    said: list[str] = []
    for free, device in ((20000, "cuda"), (70000, "cuda"), (20000, "cpu")):
        fake_smi.install(monkeypatch, tmp_path, free, programs="GPU-0, 42, python3, 61440\n")
        monkeypatch.setenv("TUNEGATE_DEVICE", device)
        with stages.device_slot(lambda event: said.append(str(event["text"]))):
            pass
    assert said == ["GPU memory: 19.5 of 79.6 GiB are free; held by pid 42 (python3) 60.0 GiB"]


def test_an_artefact_is_made_once_and_its_server_starts_before_the_key_is_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that waits for a GPU with a key's lock in hand would wait for ever on one that has the GPU and wants the key."""
    monkeypatch.setenv("TUNEGATE_HOME", str(tmp_path / "home"))
    calls: list[str] = []

    def start() -> None:
        with store.lock("evaluate/k", wait=False):
            calls.append("start")

    def make(folder: Path) -> stages.Origin:
        with pytest.raises(Busy), store.lock("evaluate/k", wait=False):
            pass
        calls.append("make")
        (folder / "payload").mkdir()
        return stages.Origin({"unit": "u"}, {"vllm": "1"}, {"items": 3})

    artifact = stages.kept("evaluate", "k", make, start)
    assert (artifact.parents, artifact.made_by, artifact.detail) == ({"unit": "u"}, {"vllm": "1"}, {"items": 3})
    assert stages.kept("evaluate", "k", make, start) == artifact
    assert calls == ["start", "make"]


def test_an_artefact_that_another_run_made_meanwhile_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two builds may start a server for the same measurement; the second finds it made once it has the key."""
    monkeypatch.setenv("TUNEGATE_HOME", str(tmp_path / "home"))

    def make(folder: Path) -> stages.Origin:
        (folder / "payload").mkdir()
        return stages.Origin({}, {}, {"by": "the other run"})

    artifact = stages.kept(
        "evaluate", "k", lambda _folder: pytest.fail("made twice"), lambda: stages.kept("evaluate", "k", make)
    )
    assert artifact.detail == {"by": "the other run"}
