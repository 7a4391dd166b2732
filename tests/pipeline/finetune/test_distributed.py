"""Training in two processes of this host (gloo), against one process on the same rows."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import programs

from pipeline.digests import digest_folder
from pipeline.environments import interpreters
from pipeline.errors import DataError, StageFailed
from pipeline.finetune import checkpoints
from pipeline.finetune.distributed import shares

# No dropout: each process draws its own. Float32, so that only the order of sums is left to differ.
SETTINGS = {
    "lora_r": 4, "lora_dropout": 0.0, "micro_batch_size": 2, "learning_rate": 1e-2, "num_epochs": 4.0,
    "warmup_ratio": 0.1, "save_steps": 4, "eval_steps": 3,
}  # fmt: skip
WORDS = ("refund", "invoice", "login", "password", "crash", "update", "order", "phone")
LORA = {"adapter": "lora", "load_in_4bit": False}


def row(number: int) -> dict:
    """A question whose length grows with its number, and its answer."""
    words = [WORDS[(number + at) % 8] for at in range(2 + number % 9)]
    messages = [
        {"role": "user", "content": f"{' and '.join(words)}, number {number}?"},
        {"role": "assistant", "content": words[-1]},
    ]
    return {"id": f"{number:02x}", "messages": messages}


@pytest.fixture(scope="module", autouse=True)
def _in_float32() -> Iterator[None]:
    """bf16 rounds more than a sum's order does."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("ATEN_CPU_CAPABILITY", "default")
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artefacts base (a tiny Llama) and prepare: 23 rows, so that the last step of an epoch has fewer, and 3 to validate."""
    folder = tmp_path_factory.mktemp("distributed")
    programs.tiny(folder / "base" / "payload")
    write_rows(folder / "prepare", 23, 3)
    return folder


def write_rows(folder: Path, train: int, validation: int) -> None:
    payload = folder / "payload"
    payload.mkdir(parents=True)
    for name, numbers in (("train", range(train)), ("val", range(50, 50 + validation))):
        lines = "".join(json.dumps(row(number)) + "\n" for number in numbers)
        (payload / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def inputs(made: Path, prepared: str = "prepare") -> dict:
    return {
        "base": programs.artifact(made / "base", "base", {}),
        "prepare": programs.artifact(made / prepared, "prepare", {}),
    }


def config(**settings: object) -> dict:
    return {"finetune": {**SETTINGS, **settings}, "sequence_len": 128, "seed": 7}


def trained(made: Path, name: str, prepared: str = "prepare", **settings: object) -> tuple[Path, dict, list]:
    """A run's folder, detail and events."""
    detail, events = programs.run("pipeline.finetune.train", made / name, config(**settings), inputs(made, prepared))
    return made / name, detail, events


def history(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "extra" / "history.jsonl").read_text().splitlines()]


def distance(one: Path, other: Path) -> float:
    """How far apart two adapters lie, relative to the way that training moved B from 0."""
    return float(programs.python(DISTANCE, one / "payload", other / "payload"))


DISTANCE = """
import sys
from safetensors.torch import load_file
one, other = (load_file(folder + "/adapter_model.safetensors") for folder in sys.argv[1:])
assert one.keys() == other.keys()
b = [name for name in one if "lora_B" in name]
apart = max(float((one[name] - other[name]).norm() / one[name].norm()) for name in b)
apart_a = max(float((one[name] - other[name]).norm() / one[name].norm()) for name in one)
print(max(apart, apart_a))
"""


def assert_same_training(one: tuple[Path, dict, list], several: tuple[Path, dict, list]) -> None:
    """Curves, tokens and adapter are equal up to the order of sums."""
    (folder, detail, _), (other, found, _) = one, several
    assert [entry["step"] for entry in history(other)] == [entry["step"] for entry in history(folder)]
    for entry, expected in zip(history(other), history(folder), strict=True):
        assert entry == pytest.approx(expected, rel=1e-3), "the same entries"
    assert (found["steps"], found["tokens"], found["rows"]) == (detail["steps"], detail["tokens"], detail["rows"])
    assert found["effective_batch_size"] == detail["effective_batch_size"] == 2
    assert distance(folder, other) < 1e-3
    losses = [entry["train_loss"] for entry in history(other) if "train_loss" in entry]
    assert losses[-1] < 0.8 * losses[0], "it learned something"


@pytest.fixture(scope="module")
def alone(made: Path) -> tuple[Path, dict, list]:
    return trained(made, "alone")


@pytest.fixture(scope="module")
def together(made: Path) -> tuple[Path, dict, list]:
    return trained(made, "together", num_processes=2)


@pytest.mark.slow
def test_two_processes_train_as_one_does(alone: tuple, together: tuple):
    """NF4, packed: the same losses step by step, the same validation losses, the same adapter."""
    assert_same_training(alone, together)
    _, detail, events = together
    assert (detail["hardware"]["processes"], detail["hardware"]["split"]) == (2, False)
    said = [event["text"] for event in events if event["event"] == "message"]
    assert said == ["2 processes share the 2 bins of each step: the batch is that of one process"]


@pytest.mark.slow
def test_the_first_process_alone_writes_and_reports(alone: tuple, together: tuple):
    """The same files as one process leaves, and each step reported once."""
    (folder, detail, _), (other, _, events) = alone, together
    names = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    assert {str(path.relative_to(other)) for path in other.rglob("*")} == names
    assert [event["done"] for event in events if event["event"] == "progress"] == list(range(1, detail["steps"] + 1))
    assert (other / "extra" / "seen_tokens.jsonl").read_bytes() == (folder / "extra" / "seen_tokens.jsonl").read_bytes()


@pytest.mark.slow
def test_a_split_base_trains_as_a_whole_one(made: Path, alone: tuple):
    """fsdp_version: 2 over NF4: each process holds its part of the packed weights, and training is the same."""
    split = trained(made, "split", num_processes=2, fsdp_version=2)
    assert_same_training(alone, split)
    assert split[1]["hardware"]["split"]
    assert split[1]["hardware"]["frozen_weights"] == "nf4"


@pytest.mark.slow
def test_a_split_base_of_sixteen_bits_trains_as_a_whole_one(made: Path):
    """adapter: lora, layers checkpointed, one row a pass: processes with fewer passes keep in step with the others."""
    settings = {**LORA, "gradient_checkpointing": True, "sample_packing": False, "num_epochs": 2.0}
    one = trained(made, "lora", **settings)
    assert_same_training(one, trained(made, "lora-split", **settings, num_processes=2, fsdp_version=2))


@pytest.mark.slow
@pytest.mark.parametrize("split", [{}, {"fsdp_version": 2}], ids=["whole", "split"])
def test_a_process_without_a_row_keeps_in_step(made: Path, split: dict):
    """One row a step: the second process has none, in training and in validation, and adds nothing."""
    if not (made / "single").exists():
        write_rows(made / "single", 1, 1)
    settings = {**LORA, "max_steps": 3, "sample_packing": False, "learning_rate": 5e-2}
    name = "single-split" if split else "single-whole"
    one = trained(made, f"{name}-alone", "single", **settings)
    assert_same_training(one, trained(made, f"{name}-two", "single", **settings, num_processes=2, **split))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_run_leaves_no_process_and_ends_with_the_same_bytes(made: Path):
    """After kill -9 of the stage program its processes end, and the same request goes on, bit by bit, dropout on."""
    settings = {"num_processes": 2, "lora_dropout": 0.1, "num_epochs": 20.0, "save_steps": 10}
    expected, detail, _ = trained(made, "not-killed", **settings)
    folder = made / "killed"
    ranks: list[int] = []

    def kill(launcher: int) -> None:
        ranks.extend(children(launcher))
        os.kill(launcher, signal.SIGKILL)

    begun(made, folder, kill, step=12, **settings)
    assert len(ranks) == 2
    until = time.monotonic() + 10
    while any(is_there(pid) for pid in ranks):
        assert time.monotonic() < until, "a process outlived its launcher"
        time.sleep(0.05)
    assert 10 <= checkpoints.newest_state(folder / "checkpoints").step < detail["steps"]
    detail, events = programs.run("pipeline.finetune.train", folder, config(**settings), inputs(made))
    assert any("going on from the checkpoint" in event.get("text", "") for event in events)
    assert digest_folder(folder / "payload") == digest_folder(expected / "payload")
    assert history(folder) == history(expected)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_goes_on_in_another_number_of_processes(made: Path, alone: tuple):
    """A checkpoint holds the whole adapter and optimizer: what two began, one ends, in the same folder."""
    folder = made / "fewer"
    begun(made, folder, lambda launcher: os.kill(launcher, signal.SIGKILL), step=6, num_processes=2)
    detail, events = programs.run("pipeline.finetune.train", folder, config(), inputs(made))
    assert_same_training(alone, (folder, detail, events))


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
def test_a_process_that_dies_ends_the_stage_with_its_name(made: Path, number: int):
    """One killed process ends the others within seconds, and the error says which it was and what to do."""
    folder, when = made / f"died{number}", []

    def kill(launcher: int) -> None:
        when.append(time.monotonic())
        os.kill(sorted(children(launcher))[number], signal.SIGKILL)

    ended = begun(made, folder, kill, step=2, num_processes=2, num_epochs=400.0)
    assert time.monotonic() - when[0] < 15
    assert isinstance(ended, StageFailed)
    assert f"process {number + 1} of 2 was killed (signal 9)" in str(ended)
    assert "goes on from the last checkpoint" in str(ended)


@pytest.mark.slow
def test_a_users_mistake_is_reported_by_its_own_error(made: Path):
    """Several processes report a mistake in the data as one would, once."""
    with pytest.raises(DataError, match="carries loss within 4 tokens"):
        programs.run(
            "pipeline.finetune.train", made / "short", {**config(num_processes=2), "sequence_len": 4}, inputs(made)
        )


def begun(made: Path, folder: Path, at: Callable[[int], None], step: int, **settings: object) -> Exception | None:
    """Run the stage program, call `at` with its pid when it reports `step`, and return the error that it ended with."""
    folder.mkdir()
    request = {"config": config(**settings), "inputs": inputs(made), "folder": str(folder)}
    (folder / "request.json").write_text(json.dumps(request))
    command = [
        *interpreters.command(interpreters.find("train"), "pipeline.finetune.train"),
        str(folder / "request.json"),
    ]
    with (folder / "log.txt").open("w") as log:
        child = subprocess.Popen(command, env=programs.environ(), stdout=subprocess.PIPE, stderr=log, text=True)
    error, called = None, False
    for line in child.stdout or ():
        event = json.loads(line)
        if event["event"] == "error":
            error = programs.from_json(event)
        if event["event"] == "progress" and event["done"] >= step and not called:
            called = True
            at(child.pid)
    child.wait()
    return error


def children(pid: int) -> list[int]:
    return [int(it) for it in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_there(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_rows_are_dealt_by_their_tokens():
    """Every row goes to one process, in order, and no two differ by more than the longest row."""
    lengths = [random.Random(3).randrange(1, 500) for _ in range(40)]
    found = shares(lengths, 3)
    assert sorted(number for some in found for number in some) == list(range(40))
    assert all(some == sorted(some) for some in found)
    loads = [sum(lengths[number] for number in some) for some in found]
    assert max(loads) - min(loads) <= max(lengths)


def test_one_process_takes_all_and_a_row_too_few_leaves_one_without():
    """The order of one process's rows is that of the step."""
    assert shares([5, 9, 1], 1) == [[0, 1, 2]]
    assert shares([4], 2) == [[0], []]
