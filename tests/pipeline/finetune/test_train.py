"""Fine-tuning, on a tiny random Llama in the train environment; what needs no torch runs here."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
from support import programs

from pipeline.digests import digest_folder
from pipeline.environments import interpreters
from pipeline.errors import ConfigError, DataError, StageFailed
from pipeline.finetune import checkpoints

SETTINGS = {
    "lora_r": 4, "lora_dropout": 0.1, "micro_batch_size": 1, "learning_rate": 2e-2, "num_epochs": 8.0,
    "warmup_ratio": 0.1, "save_steps": 4, "eval_steps": 6,
}  # fmt: skip
WORDS = ("refund", "invoice", "login", "password", "crash", "update", "order", "phone")


def row(number: int) -> dict:
    """A short question with its own answer; each third row is a conversation of two turns."""
    first, second = WORDS[number % 8], WORDS[(number * 3 + 1) % 8]
    messages = [
        {"role": "system", "content": "Name the two words in turn."},
        {"role": "user", "content": f"{first} and {second}, number {number}?"},
        {"role": "assistant", "content": f"{second} first"},
    ]
    if number % 3 == 0:
        messages += [{"role": "user", "content": "And then?"}, {"role": "assistant", "content": first}]
    return {"id": f"{number:02x}", "messages": messages}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artefacts base (a tiny Llama) and prepare (24 conversations, a text, 4 to validate)."""
    folder = tmp_path_factory.mktemp("finetune")
    programs.tiny(folder / "base" / "payload")
    payload = folder / "prepare" / "payload"
    payload.mkdir(parents=True)
    train = [*(row(number) for number in range(24)), {"id": "ff", "text": "The app crashes after an update."}]
    for name, rows in (("train", train), ("val", [row(number) for number in range(24, 28)])):
        text = "".join(json.dumps(one) + "\n" for one in rows)
        (payload / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return folder


def inputs(made: Path) -> dict:
    return {name: programs.artifact(made / name, name, {}) for name in ("base", "prepare")}


def config(**settings: object) -> dict:
    return {"finetune": {**SETTINGS, **settings}, "sequence_len": 256, "seed": 7}


@pytest.fixture(scope="module")
def whole(made: Path) -> tuple[Path, dict, list]:
    """An uninterrupted run: its folder, detail and events."""
    folder = made / "whole"
    detail, events = programs.run("pipeline.finetune.train", folder, config(), inputs(made))
    return folder, detail, events


@pytest.fixture(scope="module")
def proofs(made: Path) -> dict:
    return json.loads(programs.python(programs.TESTS / "proofs" / "finetune_proofs.py", made).splitlines()[-1])


@pytest.mark.slow
def test_packed_rows_have_the_loss_they_have_alone(proofs: dict):
    """A pack's loss is the sum of its rows' own, and each is what transformers computes for the row."""
    assert proofs["attention"] == "tunegate_rows_cpu"
    assert proofs["prefix"] > 10, "the system prompt, which goes through the model once"
    assert proofs["packed"] == pytest.approx(sum(proofs["alone"]), rel=1e-5)
    assert proofs["alone"] == pytest.approx(proofs["by_transformers"], rel=1e-4)
    assert len({round(loss, 2) for loss in proofs["alone"]}) == len(proofs["alone"]), "rows differ"


@pytest.mark.slow
def test_a_row_does_not_see_its_neighbour(proofs: dict):
    """Turning the neighbour's tokens round leaves a row's loss as it is."""
    assert proofs["beside"][0] == proofs["beside"][1]
    assert proofs["beside"][0] == pytest.approx(proofs["alone"][1], rel=1e-5)


@pytest.mark.slow
def test_passes_do_not_change_the_gradient_of_a_batch(proofs: dict):
    """The effective batch's loss is averaged over its trained tokens, in one pass or in one pass a row."""
    assert len(set(proofs["trained"])) > 1, "a mean of means would be another gradient"
    assert proofs["gradients"]["length"] > 0
    assert proofs["gradients"]["by_passes"] < 1e-5


@pytest.mark.slow
def test_checkpointing_does_not_change_the_gradient(proofs: dict):
    """Computing activations a second time gives the gradient that keeping them gives."""
    assert proofs["gradients"]["by_checkpointing"] < 1e-5


@pytest.mark.slow
def test_rows_are_apart_with_the_models_own_attention_too(proofs: dict):
    """Where the model keeps transformers' attention, positions alone keep packed rows apart."""
    assert proofs["fallback"]["packed"] == pytest.approx(sum(proofs["fallback"]["alone"]), rel=1e-5)
    assert proofs["fallback"]["alone"] == pytest.approx(proofs["by_transformers"], rel=1e-4)


@pytest.mark.slow
def test_unpacked_weights_are_the_four_bit_ones(proofs: dict):
    """A layer unpacked once answers as bitsandbytes does, with at most 16 levels a block of 64."""
    assert proofs["unpacking"]["difference"] == 0
    assert 0 < proofs["unpacking"]["rounding"] < 0.2
    assert proofs["unpacking"]["levels"] <= 16


@pytest.mark.slow
def test_a_run_goes_on_as_it_began_whatever_memory_is_free_now(proofs: dict):
    """Weights that were unpacked stay so, and the other way round."""
    found = proofs["under_other_memory"]
    assert (found["roomy"], found["tight"]) == ("nf4, unpacked once", "nf4")
    assert (found["roomy_again"], found["tight_again"]) == ("nf4, unpacked once", "nf4")


@pytest.mark.slow
def test_quick_dropout_drops_the_share_it_is_told(proofs: dict):
    """It drops p of the elements, scales the rest, draws anew each time, and is off in evaluation."""
    found = proofs["dropout"]
    assert found["dropped"] == pytest.approx(0.2, abs=0.005)
    assert found["mean"] == pytest.approx(1.0, abs=0.007)
    assert found["levels"] == 2
    assert found["same_twice"] < 0.75
    assert found["off"] == 0


@pytest.mark.slow
def test_a_run_learns_and_leaves_an_adapter_peft_can_load(whole: tuple, made: Path):
    """Loss falls, the best adapter is kept, and peft gives it the validation loss that the run reported."""
    folder, detail, _ = whole
    history = [json.loads(line) for line in (folder / "extra" / "history.jsonl").read_text().splitlines()]
    losses = [entry["train_loss"] for entry in history if "train_loss" in entry]
    assert losses[-1] < 0.6 * losses[0]
    evaluated = {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry}
    assert detail["eval_loss"] == min(evaluated.values()) == evaluated[detail["best_step"]]
    assert len(losses) == detail["steps"]
    kept = {path.name for path in (folder / "checkpoints").iterdir()}
    last = detail["steps"]
    steps = {f"best-{detail['best_step']}", f"step-{last}", f"step-{(last - 1) // 4 * 4}"}
    assert kept == steps | {"hardware.json"}
    assert (folder / "extra" / "loss.png").read_bytes().startswith(b"\x89PNG")
    loss = programs.python(LOADED, made / "base" / "payload", folder, made / "prepare" / "payload")
    assert float(loss) == pytest.approx(detail["eval_loss"], rel=0.02)


LOADED = """
import sys, torch
from pathlib import Path
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from pipeline.finetune import model as finetune_model
from pipeline.finetune import rows as finetune_rows
from pipeline.config.schema import FinetuneConfig
base, done, prepared = map(Path, sys.argv[1:])
four = finetune_model.four_bit(FinetuneConfig(), torch.float32)
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, quantization_config=four)
model = PeftModel.from_pretrained(model, done / "payload")
rows = finetune_rows.read(base, prepared, done / "again", FinetuneConfig(), 256).validation
total = 0.0
for row in rows:
    ids, labels = torch.tensor([row.input_ids.tolist()]), torch.tensor([row.labels.tolist()])
    with torch.no_grad():
        total += float(model(input_ids=ids, labels=labels).loss) * row.trained
print(total / sum(row.trained for row in rows))
"""


@pytest.mark.slow
def test_progress_and_curves_are_reported(whole: tuple):
    """Every step reports done of total with loss and rate, and the curves for MLflow."""
    _, detail, events = whole
    progress = [event for event in events if event["event"] == "progress"]
    assert [event["done"] for event in progress] == list(range(1, detail["steps"] + 1))
    assert {event["total"] for event in progress} == {detail["steps"]}
    assert set(progress[0]["metrics"]) == {"loss", "lr", "tokens/s"}
    names = {event["name"] for event in events if event["event"] == "metric"}
    assert names == {"train_loss", "eval_loss", "learning_rate", "grad_norm", "tokens_per_second"}


@pytest.mark.slow
def test_the_payload_names_no_machine(whole: tuple, made: Path):
    """The adapter's config carries the base's digest, never a path, and short names of the layers."""
    folder, _, _ = whole
    adapter = json.loads((folder / "payload" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == f"sha256:{inputs(made)['base']['digest']}"
    assert adapter["target_modules"] == [
        "down_proj",
        "gate_proj",
        "k_proj",
        "o_proj",
        "q_proj",
        "up_proj",
        "v_proj",
    ]
    assert sorted(path.name for path in (folder / "payload").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip


@pytest.mark.slow
def test_seen_tokens_are_the_conversations_as_trained(whole: tuple):
    """The first conversations come token by token, labelled on each answer and its end token alone."""
    folder, _, _ = whole
    seen = [json.loads(line) for line in (folder / "extra" / "seen_tokens.jsonl").read_text().splitlines()]
    assert len(seen) == 16
    assert [one["messages"] for one in seen] == [row(number)["messages"] for number in range(16)]
    for one in seen:
        spans = [len(list(some)) for kept, some in itertools.groupby(one["labels"], lambda it: it != -100) if kept]
        assert len(spans) == len(one["messages"]) // 2
        assert one["labels"][one["prompt_length"] :] == one["input_ids"][one["prompt_length"] :]
        assert one["input_ids"][-1] == 2, "ends with <|im_end|>"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_run_ends_with_the_same_bytes(whole: tuple, made: Path):
    """After kill -9, dropout on, the same request ends with the bytes of an uninterrupted run."""
    expected, detail, _ = whole
    folder = made / "killed"
    reached = kill_after(folder, made, step=6)
    left = checkpoints.newest_state(folder / "checkpoints").step
    assert 4 <= left <= reached < detail["steps"]
    again, events = programs.run("pipeline.finetune.train", folder, config(), inputs(made))
    said = [event["text"] for event in events if event["event"] == "message"]
    assert said == [f"going on from the checkpoint of step {left} of {detail['steps']}"]
    assert min(event["done"] for event in events if event["event"] == "progress") == left + 1
    assert digest_folder(folder / "payload") == digest_folder(expected / "payload")
    history = (folder / "extra" / "history.jsonl").read_bytes()
    assert history == (expected / "extra" / "history.jsonl").read_bytes()
    assert again["eval_loss"] == detail["eval_loss"]


def kill_after(folder: Path, made: Path, step: int) -> int:
    """Start the stage program and kill it as soon as it reports `step`; the last step it reported.

    It can't run ahead by more than a page of reports, however late it is killed, and a step is reported before it is kept.
    """
    folder.mkdir()
    request = {"config": config(), "inputs": inputs(made), "folder": str(folder)}
    (folder / "request.json").write_text(json.dumps(request))
    command = [
        *interpreters.command(interpreters.find("train"), "pipeline.finetune.train"),
        str(folder / "request.json"),
    ]
    child = subprocess.Popen(
        command, env=programs.environ(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, pipesize=4096
    )
    done, killed = 0, False
    for line in child.stdout or ():
        event = json.loads(line)
        done = event["done"] if event["event"] == "progress" else done
        if done >= step and not killed:
            os.kill(child.pid, signal.SIGKILL)
            killed = True
    assert child.wait() == -signal.SIGKILL
    return done


@pytest.mark.slow
def test_what_cannot_be_trained_is_said(made: Path):
    """A diverging rate, an unknown layer, a GPU's optimizer, rows cut too short: each has its remedy."""
    chats = made / "chats" / "payload"
    chats.mkdir(parents=True)
    (chats / "train.jsonl").write_text(json.dumps(row(1)), encoding="utf-8")
    (chats / "val.jsonl").touch()
    only_chats = {**inputs(made), "prepare": programs.artifact(made / "chats", "prepare", {})}
    requests = [
        (made / "wrong1", config(learning_rate=1e30, warmup_ratio=0.0, max_steps=6), inputs(made)),
        (
            made / "wrong5",
            config(learning_rate=1e30, warmup_ratio=0.0, max_steps=6, logging_steps=6, save_steps=3),
            inputs(made),
        ),
        (made / "wrong6", config(lora_target_modules=["lm_head"]), inputs(made)),
        (made / "wrong2", config(lora_target_modules=["query"]), inputs(made)),
        (made / "wrong3", config(optimizer="paged_adamw_8bit"), inputs(made)),
        (made / "wrong4", {**config(), "sequence_len": 8}, only_chats),
    ]
    diverged, before_saving, head, unknown, gpu, cut = programs.run_many("pipeline.finetune.train", requests, made)
    assert isinstance(diverged, StageFailed)
    assert "lower finetune.learning_rate (it was 1e+30)" in str(diverged)
    assert "step 3: the loss is nan" in str(before_saving)
    assert not list((made / "wrong5" / "checkpoints").glob("step-*")), "no checkpoint that isn't a number"
    assert isinstance(head, ConfigError)
    assert "take lm_head out of finetune.lora_target_modules" in str(head)
    assert isinstance(unknown, ConfigError)
    assert "down_proj, gate_proj, k_proj" in str(unknown)
    assert isinstance(gpu, ConfigError)
    assert "adamw_torch" in str(gpu)
    assert isinstance(cut, DataError)
    assert "none of 1 training rows carries loss within 8 tokens" in str(cut)


def test_half_written_checkpoints_are_not_seen(tmp_path: Path):
    """A folder that was never renamed is no checkpoint."""
    (tmp_path / ".step-8.partial").mkdir()
    assert checkpoints.newest_state(tmp_path).step == 0
