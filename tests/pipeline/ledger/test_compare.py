"""The ledger's arithmetic, and that a planted fault is named at its step."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from support import programs

from pipeline import program
from pipeline.artifacts import Evaluation, Item, LedgerEntry
from pipeline.digests import digest_folder
from pipeline.environments import interpreters
from pipeline.evaluation import scoring
from pipeline.ledger import compare, scores

WORDS = ("amber", "birch", "cedar", "delta", "ember", "flint", "grove", "heron", "ivory", "jade")


def entry(step: str, right: int, count: int = 40, first: int = 0) -> LedgerEntry:
    """A step that has the first `right` items right."""
    items = tuple(
        Item(id=str(number), prompt="?", expected="yes", answer="yes", finish_reason="stop",
             scores={"exact_match": float(number < right)})
        for number in range(first, first + count)
    )  # fmt: skip
    return LedgerEntry(step=step, engine="vllm" if step == "served" else "transformers", items=items)


def whole(**right: int) -> list[LedgerEntry]:
    """A ledger in order, with the dequantized merge taken."""
    usual = {"base": 0, "adapter": 36, "merged_original": 36, "merged_dequantized": 36, "quantized": 35, "served": 35}
    return [entry(step, count) for step, count in {**usual, **right}.items()]


def test_each_step_is_held_against_what_it_was_made_from():
    """Both merges against the adapter, AWQ against the merge that stands before it, serving against AWQ."""
    found = compare.changes(whole(merged_original=20), "exact_match", 0.95)
    assert [(one.step, one.before) for one in found] == [
        ("adapter", "base"), ("merged_original", "adapter"), ("merged_dequantized", "adapter"),
        ("quantized", "merged_dequantized"), ("served", "quantized"),
    ]  # fmt: skip
    assert found[1].change.value == pytest.approx(-0.4)
    assert found[3].change.value == pytest.approx(-1 / 40)


def test_the_step_that_lost_most_is_named():
    """Two steps lose measurably; the larger loss is the culprit."""
    found = compare.culprit(whole(merged_dequantized=30, quantized=12, served=12), "exact_match", 0.95)
    assert found
    assert (found.step, found.before) == ("quantized", "merged_dequantized")
    assert found.change.value == pytest.approx(-18 / 40)
    assert found.change.high < 0


def test_a_loss_within_chance_names_nobody():
    """One item of 40 is no proof."""
    assert compare.culprit(whole(), "exact_match", 0.95) is None
    assert compare.culprit([], "exact_match", 0.95) is None


def test_the_merge_that_was_not_taken_is_no_culprit():
    """It is on nobody's way; the table shows it all the same."""
    assert compare.culprit(whole(merged_original=5), "exact_match", 0.95) is None


def test_a_step_that_was_not_measured_is_passed_over():
    """Its successor is compared with the step before it, and says so."""
    entries = [one for one in whole(served=10) if one.step != "quantized"]
    found = compare.culprit(entries, "exact_match", 0.95)
    assert found
    assert (found.step, found.before) == ("served", "merged_dequantized")


def test_the_served_step_is_what_the_evaluation_found():
    """The same items in the order of the step before, taken from the candidate's, of which there may be more."""
    items = entry("served", 25).items
    candidate = Evaluation(
        system="candidate", unit_digest="0", holdout_digest="0", metrics={}, items=items[::-1], errors=0, seconds=0.0
    )
    before = entry("quantized", 20, count=30)
    last = compare.served(candidate, before)
    assert last.items == items[:30]
    assert (last.step, last.engine) == ("served", "vllm")


def test_other_items_are_no_pairs():
    """A ledger over different items is a mistake of the caller's."""
    with pytest.raises(ValueError, match="quantized and adapter were not scored on the same items"):
        compare.changes([entry("adapter", 30), entry("quantized", 30, first=1)], "exact_match", 0.95)


def row(verb: str, item: int) -> dict[str, Any]:
    """One conversation that can be learned by heart."""
    messages = [
        {"role": "user", "content": f"{verb} code of item {item}"},
        {"role": "assistant", "content": WORDS[item]},
    ]
    return {"id": f"{verb} {item}", "messages": messages}


@pytest.fixture(scope="module")
def proofs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder and the figures of ledger_proofs.py. The holdout repeats the training rows: a sound step knows it all."""
    folder = tmp_path_factory.mktemp("ledger")
    payload = folder / "prepare" / "payload"
    payload.mkdir(parents=True)
    rows = [row(verb, item) for verb in ("Tell me the", "What is the") for item in range(10)]
    for name, some in (("train", rows), ("holdout", rows), ("val", rows[:4]), ("calibration", rows[:8])):
        (payload / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in some))
    return folder, json.loads(programs.python(programs.TESTS / "proofs" / "ledger_proofs.py", folder).splitlines()[-1])


def made(folder: Path, name: str) -> tuple[LedgerEntry, ...]:
    """The ledger of a chain. In vLLM's place stands what the folder that would be served said in the last step."""
    detail = json.loads((folder / name / "detail.json").read_text())
    records = {
        "ledger": programs.artifact(folder / name / "ledger", "ledger", detail),
        "prepare": programs.artifact(folder / "prepare", "prepare", {}),
    }
    config = {"evaluate": {"scorers": [{"metric": "exact_match"}]}}
    request = program.Request(config, records, folder / name / "scored")
    scores.run(request)
    entries = scores.ENTRIES.validate_json((request.payload / "ledger.json").read_bytes())
    candidate = Evaluation(
        system="candidate",
        unit_digest="0",
        holdout_digest="0",
        metrics={},
        items=entries[-1].items,
        errors=0,
        seconds=0.0,
    )
    return (*entries, compare.served(candidate, entries[-1]))


@pytest.mark.slow
def test_a_sound_chain_has_no_culprit(proofs):
    """The base knows nothing and no step after training loses measurably; the base's sampling default plays no part."""
    folder, _ = proofs
    entries = made(folder, "clean")
    means = {one.step: scoring.metric(one.items, "exact_match", 0.95).value for one in entries}
    assert list(means)[:2] == ["base", "adapter"]
    assert list(means)[-2:] == ["quantized", "served"]
    assert means["base"] == 0
    assert means["adapter"] > 0.9
    assert {item.finish_reason for item in entries[1].items} == {"stop"}
    assert compare.culprit(entries, "exact_match", 0.95) is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "step"),
    [("adapter_not_applied", "merged"), ("wrong_rope_theta", "quantized"), ("scaled_groups", "quantized")],
)
def test_a_planted_fault_is_named_at_its_step(proofs, fault, step):
    """Whatever the files say wrongly, the step whose folder it is has lost."""
    folder, _ = proofs
    found = compare.culprit(made(folder, fault), "exact_match", 0.95)
    assert found
    assert found.step.startswith(step)
    assert found.change.value < -0.3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "step", "said"),
    [("nan_scale", "quantized", "weight_scale: 1 of"), ("nan_weight", "merged_", "down_proj.weight: holds NaN")],
)
def test_a_broken_weight_is_refused_at_its_step(proofs, fault, step, said):
    """NaN would be scored as nonsense; the error names the step, the file and the tensor."""
    _, seen = proofs
    assert f"the ledger stops at the step {step}" in seen["errors"][fault]
    assert said in seen["errors"][fault]


@pytest.mark.slow
def test_prompts_are_what_training_saw(proofs):
    """Id by id, as the trainer recorded them."""
    folder, seen = proofs
    lines = (folder / "finetune" / "extra" / "seen_tokens.jsonl").read_text().splitlines()
    trained = [json.loads(line) for line in lines]
    assert len(trained) > 10
    assert seen["prompts"][: len(trained)] == [one["input_ids"][: one["prompt_length"]] for one in trained]


@pytest.mark.slow
def test_padding_changes_no_answer(proofs):
    """A prompt beside one four times as long is answered as it is alone."""
    _, seen = proofs
    assert len(seen["alone"]) == 20
    assert seen["padded"] == seen["alone"]


@pytest.mark.slow
def test_a_killed_ledger_goes_on_to_the_same_bytes(proofs, tmp_path):
    """A batch from before kill -9 isn't asked again."""
    folder, _ = proofs
    records = json.loads((folder / "records.json").read_text())
    request = {
        "inputs": records, "folder": str(tmp_path),
        "config": {"finetune": {}, "max_items": None, "ledger_items": 20, "max_tokens": 12},
    }  # fmt: skip
    (tmp_path / "asked.json").write_text(json.dumps(request))
    command = [*interpreters.command(interpreters.find("train"), "pipeline.ledger.answers"), tmp_path / "asked.json"]
    with subprocess.Popen(command, env=programs.environ(), stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout
        assert json.loads(child.stdout.readline())["done"] == 20
        os.kill(child.pid, signal.SIGKILL)
    kept = tmp_path / "batches" / "base" / "0.json"  # told only once it lies there
    written = kept.stat().st_mtime_ns
    programs.run("pipeline.ledger.answers", tmp_path, request["config"], records)
    assert kept.stat().st_mtime_ns == written
    assert digest_folder(tmp_path / "payload") == digest_folder(folder / "clean" / "ledger" / "payload")
