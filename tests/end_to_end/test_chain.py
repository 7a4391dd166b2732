"""The whole chain with a tiny random Llama that learns rows by heart: everything else is real.

Real commands in real processes: Prefect, QLoRA, AWQ, vLLM, MLflow, Caddy. The first run is killed in the middle of
fine-tuning, so what is tested afterwards is also what a resumed run comes to.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from fakes.fake_judge import endpoint
from support.chain import (
    CONFIG,
    ONE_THREAD,
    PROMPTS,
    TASK,
    TESTS,
    WORDS,
    House,
    ask,
    children,
    choice,
    knows_the_words,
    row,
)

from pipeline import program
from pipeline.artifacts import Build, Reports
from pipeline.config.schema import Config
from pipeline.digests import digest_folder
from pipeline.environments import interpreters
from pipeline.gate import gate

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

# The base's own sampling default: vLLM would apply it to every request, and no answer would end.
PENALTY = 5.0


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """A house whose first build was killed and whose second went through."""
    folder = tmp_path_factory.mktemp("chain")
    made = House(folder, 8200 + os.getpid() % 1600)
    (folder / "train.jsonl").write_text(
        "".join(row(verb, item) for verb in ("Tell me the", "What is the") for item in range(10))
    )
    (folder / "holdout.jsonl").write_text("".join(row("Say the", item) for item in range(10)))
    (folder / "prompts.yaml").write_text(PROMPTS)
    (folder / "words.yaml").write_text(TASK)
    (folder / "words.jsonl").write_text("".join(choice(item) for item in range(10)))
    train = interpreters.find("train")
    subprocess.run(
        [train.interpreter, TESTS / "support" / "tiny.py", folder / "model"],
        env=interpreters.child_environ(train),
        check=True,
    )
    generation = folder / "model" / "generation_config.json"
    generation.write_text(json.dumps({**json.loads(generation.read_text()), "repetition_penalty": PENALTY}))
    with endpoint(knows_the_words) as judge:
        (folder / "tiny.yaml").write_text(CONFIG.format(folder=folder, port=made.port, judge=judge.base_url))
        kill_after_a_checkpoint(made)
        made.said = made.tunegate("run", made.config)
        yield made
    made.tunegate("down")


def kill_after_a_checkpoint(house: House) -> None:
    """Start a build and kill it, -9, its stage too, once fine-tuning has written a checkpoint and gone on."""
    build = subprocess.Popen(
        house.command("run", house.config), env=house.environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 300
    work = house.folder / "mlruns" / "work"
    while not list(work.glob("finetune/.*.partial/checkpoints/step-*")):
        assert build.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for pid in [build.pid, *children(build.pid)]:
        with suppress(ProcessLookupError):  # a stage whose reader is gone ends by itself
            os.kill(pid, signal.SIGKILL)
    build.wait()
    assert not list(work.glob("finetune/*/artifact.json"))


def build_of(house: House) -> Build:
    """The finished build's record."""
    return Build.model_validate_json(house.only("build/*/build.json").read_text())


def test_a_killed_build_goes_on_and_repeats_no_finished_stage(house: House) -> None:
    """The second run takes base and data from the store, fine-tunes on from the checkpoint, and passes."""
    lines = [line.split() for line in house.said.splitlines()]
    states = {words[0]: words[1] for words in lines if len(words) > 1 and words[1] in ("cached", "done")}
    assert (states["base"], states["prepare"], states["finetune"]) == ("cached", "cached", "done")
    steps = [int(words[1].split("/")[0]) for words in lines if words[:1] == ["finetune"] and words[2:3] == ["steps"]]
    assert steps
    assert min(steps) > 1
    verdict = build_of(house).verdict
    assert verdict
    assert verdict.outcome == "pass"


def test_the_bases_own_sampling_defaults_do_not_colour_what_is_judged(house: House) -> None:
    """The penalty is still in the folder that serves; asked plainly, the model answers as it was trained, and ends."""
    made = build_of(house)
    served = json.loads((made.artifacts["quantize"].payload / "generation_config.json").read_text())
    assert served["repetition_penalty"] == PENALTY
    assert "--generation-config=vllm" in made.unit.flags
    assert {item.finish_reason for item in made.evaluations["candidate"].items} == {"stop"}


def test_the_ledger_follows_the_candidate_from_its_base_to_its_server(house: House) -> None:
    """Every step on the holdout's rows, the merge that was taken last; what vLLM said isn't asked again."""
    made = build_of(house)
    taken = f"merged_{made.artifacts['merge'].detail['merge_base']}"
    steps = [entry.step for entry in made.ledger]
    assert (steps[:2], steps[3:]) == (["base", "adapter"], [taken, "quantized", "served"])
    assert made.ledger[-1].items == made.evaluations["candidate"].items
    right = {entry.step: sum(item.scores["exact_match"] for item in entry.items) for entry in made.ledger}
    assert right["base"] == 0
    assert min(right["adapter"], right[taken]) >= 4


def test_every_measurement_is_told_the_configs_seed(house: House) -> None:
    """Evaluations and load tests are as repeatable as the training."""
    work = house.folder / "mlruns" / "work"
    requests = [*work.glob("evaluate/*/request.json"), *work.glob("build/*/loadtest-*/request.json")]
    assert len(requests) == 3
    assert {json.loads(file.read_text())["config"]["seed"] for file in requests} == {42}


def test_the_candidate_was_asked_the_must_pass_prompts(house: House) -> None:
    """Greedily, as in the evaluation, and the gate was told."""
    made = build_of(house)
    (asked,) = made.prompts["candidate"]
    assert (asked.id, asked.prompt, asked.broken) == ("no item is a zebra", "Say the code of item 3", ())
    assert asked.answer
    assert made.verdict
    assert "must-pass prompts" in [check.name for check in made.verdict.checks]


def test_lm_evals_tasks_ran_on_each_served_system(house: House) -> None:
    """Offline, by log-likelihood of the real vLLM: what was learned is known, and lm-eval's own JSON says the same."""
    found = build_of(house).tasks
    acc = {role: next(record for record in records if record.metric == "acc") for role, records in found.items()}
    assert set(acc) == {"base", "candidate"}
    assert sum(acc["candidate"].values) > sum(acc["base"].values)
    assert acc["base"].ids == acc["candidate"].ids
    for payload in (house.folder / "mlruns" / "work" / "tasks").glob("*/payload"):
        (results,) = payload.glob("tiny/results_*.json")
        (samples,) = payload.glob("tiny/samples_words_*.jsonl")
        logged = [json.loads(line) for line in samples.read_text().splitlines()]
        likelihoods = [[float(answer[0][0]) for answer in sample["resps"]] for sample in logged]
        right = [float(other < ours < 0) for other, ours in likelihoods]
        assert json.loads(results.read_text())["results"]["words"]["acc,none"] == sum(right) / 10
        assert tuple(right) in (acc["base"].values, acc["candidate"].values)


def test_a_judge_compared_candidate_and_base_in_both_orders(house: House) -> None:
    """Over the wire: the tuned model knows words that its base doesn't, and the judge agrees with itself."""
    made = build_of(house)
    (report,) = made.judged
    assert (report.against, report.model, len(report.items), report.failed) == ("base", "a-judge", 10, 0)
    right = [item.answer in WORDS for item in made.evaluations["candidate"].items]
    assert [item.score for item in report.items] == [1.0 if known else 0.5 for known in right]
    assert report.agreement.value == 1.0
    assert made.verdict
    assert {"words/acc", "judge vs base"} <= {check.name for check in made.verdict.checks}


def test_the_resumed_adapter_is_the_uninterrupted_one(house: House, tmp_path: Path) -> None:
    """The same request run in one go gives the same bytes."""
    resumed = house.only("finetune/*/artifact.json").parent
    request = json.loads((resumed / "request.json").read_text())
    train = interpreters.find("train")
    program.run(
        interpreters.command(train, "pipeline.finetune.train"), {**interpreters.child_environ(train), **ONE_THREAD},
        program.Request(request["config"], request["inputs"], tmp_path), lambda _event: None,
    )  # fmt: skip
    assert digest_folder(tmp_path / "payload") == digest_folder(resumed / "payload")


def test_the_untrained_self_fails_the_same_gate(house: House) -> None:
    """The base model's answers, judged as if it were the candidate, fail the policy that the tuned one passed."""
    made = build_of(house)
    untrained = made.evaluations["base"].model_copy(update={"system": "candidate"})
    policy = Config.model_validate(made.config).gate
    loadtests = {
        role: test.model_copy(update={"unit_digest": untrained.unit_digest}) for role, test in made.loadtests.items()
    }
    reports = Reports(
        evaluations={"base": made.evaluations["base"], "candidate": untrained},
        loadtests=loadtests,
        tasks=dict.fromkeys(made.tasks, made.tasks["base"]),
        judged=made.judged,
    )
    verdict = gate.verdict_of(reports, policy, untrained.unit_digest)
    assert verdict.outcome == "fail"


def test_running_again_is_a_no_op(house: House) -> None:
    """Nothing changed, so nothing runs, and Prefect isn't started."""
    started = time.monotonic()
    said = house.tunegate("run", house.config)
    assert "nothing that is judged changed" in said
    assert " running " not in said
    assert time.monotonic() - started < 20


def test_only_an_approved_version_is_promoted_and_answers(house: House) -> None:
    """Promotion is refused before approval; after it the proxy answers with what was learned, and rollback has nowhere to go."""
    refused = house.tunegate("promote", "tiny", code=5)
    assert "nothing unapproved is promoted" in refused
    assert "waits for review" in house.tunegate("review", "tiny")
    house.tunegate("approve", "tiny", "--reviewer", "tests", "--reason", "it knows its words")
    assert "is live" in house.tunegate("promote", "tiny")
    assert "was approved by tests and promoted" in house.tunegate("run", house.config)
    answer = ask(house)
    assert answer.status_code == httpx.codes.OK, answer.text
    evaluated = {item.prompt: item.answer for item in build_of(house).evaluations["candidate"].items}
    assert answer.json()["choices"][0]["message"]["content"] == evaluated["Say the code of item 3"]
    assert ask(house, "/tokenize").status_code == httpx.codes.NOT_FOUND
    status = json.loads(house.tunegate("status", "tiny", "--json"))[0]
    assert (status["state"], status["version"], status["unit_digest"]) == ("live", "1", build_of(house).unit.digest)
    house.tunegate("rollback", "tiny", code=5)


def test_what_serves_is_byte_for_byte_what_was_judged(house: House) -> None:
    """The folder in MLflow's store has the digest that the evaluation, the approval and the deployment name."""
    made = build_of(house)
    (served,) = (house.folder / "mlruns" / "artifacts").glob("tiny/*/artifacts/models/*")
    assert digest_folder(served) == made.artifacts["quantize"].digest
    assert made.evaluations["candidate"].unit_digest == made.unit.digest


def test_a_promoted_release_that_changed_on_disk_is_not_served_again(house: House) -> None:
    """One byte more in the weights' folder voids the approval."""
    house.tunegate("down")
    (served,) = (house.folder / "mlruns" / "artifacts").glob("tiny/*/artifacts/models/*")
    template = served / "tokenizer_config.json"
    original = template.read_bytes()
    template.unlink()
    template.write_bytes(original + b" ")
    assert "unit.tokenizer" in house.tunegate("promote", "tiny", code=5)
    template.write_bytes(original)
    assert "is live" in house.tunegate("promote", "tiny")
    assert ask(house).status_code == httpx.codes.OK
