"""Faults planted in files and servers, each caught at its step and with its cause named; without them the same step passes.

Here: a swapped chat template, a doubled BOS, a calibration set shuffled in the store, a stale incumbent, a server of other flags.
In test_ledger.py: an adapter that isn't applied, a misread rope_theta, weights corrupted by the quantizer, a NaN.
In test_data.py: holdout rows in the training data.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
from fakes.fake_vllm import BOS, chatml
from support.released import ENVIRONMENT, a_config, a_model, a_release, write_weights
from support.wire import fake_vllm

from flows import stages, systems
from pipeline import store
from pipeline.errors import ModelError, RegistryError, ServingError, StageFailed
from pipeline.evaluation import evaluate
from pipeline.program import Request
from pipeline.registry import versions
from pipeline.serving import runtimes
from pipeline.serving import serve as serving
from pipeline.serving.server import ToServe

NAME = "served"
MESSAGES = [{"role": "user", "content": "where is my card?"}, {"role": "assistant", "content": "card_arrival"}]


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNEGATE_HOME", str(tmp_path / "home"))


def trained(folder: Path, url: str, bos: int) -> Request:
    """The evaluation of a system that was trained in ChatML with so many BOS in front."""
    payload, extra = folder / "prepare" / "payload", folder / "finetune" / "extra"
    for place in (payload, extra):
        place.mkdir(parents=True)
    (payload / "holdout.jsonl").write_text(json.dumps({"id": "0", "messages": MESSAGES}) + "\n")
    prompt = BOS * bos + chatml(MESSAGES[:-1], True)
    whole = BOS * bos + chatml(MESSAGES, False).rstrip("\n")
    seen = {
        "messages": MESSAGES,
        "input_ids": list(whole.encode()),
        "labels": [],
        "prompt_length": len(prompt.encode()),
    }
    (extra / "seen_tokens.jsonl").write_text(json.dumps(seen))
    config = {
        "evaluate": {"max_tokens": 64}, "gate": {}, "system": "candidate", "url": url, "model": NAME, "unit_digest": "u",
    }  # fmt: skip
    inputs = {name: {"path": str(folder / name)} for name in ("prepare", "finetune")}
    return Request(config, inputs, folder / "work")


@pytest.mark.parametrize(
    ("bos", "planted", "said"),
    [
        (0, {}, None),
        (
            0,
            {"template": "headers"},
            r"prompt of conversation 1, token 1: training saw 60 (?s:.*)compare chat_template",
        ),
        (1, {"bos": 1}, None),
        (1, {"bos": 2}, "puts the BOS token 1 in front twice"),
        (0, {"bos": 1}, "puts the BOS token 1 in front where training had none"),
        (0, {"stop": "</s>."}, r"ends an answer at token 46 '\.'; training ended it with 62 '>'"),
    ],
)
def test_a_server_that_renders_otherwise_than_training_is_caught_before_any_item(tmp_path, bos, planted, said):
    """Another model's template, a BOS doubled, a BOS that training never saw, another stop token."""
    with fake_vllm(NAME, **planted) as url:
        made = trained(tmp_path, url, bos)
        made.folder.mkdir()
        with pytest.raises(ModelError, match=said) if said else nullcontext():
            assert evaluate.run(made)["items"] == 1
    assert (made.folder / "items.jsonl").exists() == (said is None)


@pytest.mark.parametrize("shuffled", [False, True])
def test_a_calibration_set_shuffled_in_the_store_is_caught_before_quantizing(shuffled):
    """The quantizer is handed what prepare made, or nothing."""
    with store.making("prepare", "k") as partial:
        (partial / "payload").mkdir()
        (partial / "payload" / "calibration.jsonl").write_text('{"text": "one two three"}\n')
        made = {"prepare": store.finish("prepare", "k", partial, parents={}, made_by={}, detail={})}
    if shuffled:
        (made["prepare"].payload / "calibration.jsonl").write_text('{"text": "three one two"}\n')
    with pytest.raises(StageFailed, match="prepare artefact was changed") if shuffled else nullcontext():
        assert stages.inputs_json(made, ("prepare",))


@pytest.mark.parametrize("stale", [False, True])
def test_an_incumbent_of_other_weights_than_approved_is_caught_before_it_is_measured(tmp_path, monkeypatch, stale):
    """A candidate is held against the version that was approved, not against what lies in its place by now."""
    config = a_config(evaluate={"compare": []})
    champion = a_release(a_model(tmp_path / "old"), "1", config)
    candidate = a_model(tmp_path / "new")
    monkeypatch.setattr(versions, "champion", lambda _name: champion)
    monkeypatch.setattr(versions, "config_of", lambda _run: config)
    monkeypatch.setattr(runtimes, "environment_of", lambda _config: ENVIRONMENT)
    if stale:
        write_weights(champion.model_path, "of the version before")
    unit = serving.served_unit(candidate, config.serve, config.name, ENVIRONMENT)
    artifacts = {"quantize": SimpleNamespace(payload=candidate)}
    with pytest.raises(RegistryError, match=r"unit\.weights(?s:.*)as v1 was approved") if stale else nullcontext():
        found = systems.systems(config.model_dump(mode="json"), artifacts, unit, lambda _event: None)
        assert [system.role for system in found] == ["candidate", "incumbent"]


@pytest.mark.parametrize("flag", [{}, {"max_num_seqs": 3}, {"extra_args": {"quantization": "gptq"}}])
def test_a_server_of_other_flags_than_judged_is_caught_before_it_starts(tmp_path, flag):
    """One flag more or less is another unit."""
    config = a_config()
    model = a_model(tmp_path / "model")
    unit = serving.served_unit(model, config.serve, NAME, ENVIRONMENT)
    serve = config.serve.model_copy(update=flag)
    with pytest.raises(ServingError, match=r"unit\.flags") if flag else nullcontext():
        to_serve = ToServe(unit, model, serve, NAME, tmp_path / "server", ENVIRONMENT)
        server = serving.start(to_serve, keep=False, on_event=lambda _event: None)
        serving.stop(server, 1)
