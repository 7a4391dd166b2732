"""lm-eval's tasks: records from what it writes, and the real lm-eval over HTTP, offline; with vLLM it is the chain's test."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import programs
from support.wire import fake_vllm

from pipeline.artifacts import TaskResult
from pipeline.errors import ConfigError, TunegateError
from pipeline.evaluation import lm_eval_tasks

NAME = "tiny"
GENERATE = """\
task: capitals
dataset_path: json
dataset_kwargs: {data_files: {test: capitals.jsonl}}
output_type: generate_until
test_split: test
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 8, temperature: 0.9, do_sample: true}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}, {metric: bleu}]
"""


def logged(values: dict[str, list], filters=("none",)) -> tuple[dict, dict]:
    """lm-eval's results and samples of one task, as it shapes them; each metric's whole is its mean unless given as wrong."""
    count = len(next(iter(values.values())))
    samples = [
        {
            "doc_id": number, "doc_hash": f"{number:064x}", "filter": name, "metrics": list(values),
            **{metric: found[number] if place == 0 else 0.0 for metric, found in values.items()},
        }
        for place, name in enumerate(filters)
        for number in range(count)
    ]  # fmt: skip
    whole = {
        f"{metric},{filters[0]}": sum(found) / count
        for metric, found in values.items()
        if all(isinstance(value, int | float) for value in found)
    }
    results = {"results": {"t": whole}, "higher_is_better": {"t": dict.fromkeys(values, True)}}
    return results, {"t": samples}


def test_a_metric_that_is_a_mean_becomes_a_record():
    """A value a document, in the documents' order, by the first filter."""
    results, samples = logged({"acc": [1.0, 0.0, True], "acc_norm": [0.0, 0.0, 1.0]}, filters=("strict", "flexible"))
    results["higher_is_better"]["t"]["acc_norm"] = False
    acc, norm = lm_eval_tasks.records(results, samples)
    assert acc == TaskResult(
        task="t", metric="acc", higher_is_better=True, values=(1.0, 0.0, 1.0),
        ids=("0-000000000000", "1-000000000000", "2-000000000000"),
    )  # fmt: skip
    assert (norm.metric, norm.higher_is_better, norm.values) == ("acc_norm", False, (0.0, 0.0, 1.0))


def test_a_metric_of_all_documents_together_has_no_record():
    """The likes of bleu are a number for the corpus, perplexity no mean of the documents' values, and NaN is no value."""
    results, samples = logged(
        {"bleu": [("a", "b"), ("c", "d")], "perplexity": [-1.0, -2.0], "nan": [float("nan"), 1.0], "acc": [1, 0]}
    )
    results["results"]["t"] |= {"bleu,none": 12.0, "perplexity,none": 4.48}
    assert [record.metric for record in lm_eval_tasks.records(results, samples)] == ["acc"]


def test_metrics_that_are_asked_for_must_be_there():
    """What is there is told; without any there is nothing to judge by."""
    results, samples = logged({"acc": [1.0, 0.0], "f1": [0.5, 0.5]})
    assert [record.metric for record in lm_eval_tasks.records(results, samples, ["f1"])] == ["f1"]
    with pytest.raises(ConfigError, match="t: em is not a mean over its documents") as caught:
        lm_eval_tasks.records(results, samples, ["em", "f1"])
    assert caught.value.problems[0].allowed == "acc, f1"
    with pytest.raises(ConfigError, match="t: no metric is a mean over its documents"):
        lm_eval_tasks.records(*logged({"bleu": [("a", "b")]}))


def write(folder: Path, text: str, data: str, rows: list[dict], name: str) -> str:
    """A task file and its data."""
    folder.mkdir(exist_ok=True)
    (folder / data).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / name).write_text(text)
    return str(folder / name)


def capitals(folder: Path, text: str = GENERATE, name: str = "capitals.yaml") -> str:
    """A task that generates: the fake's answer, ok, is right for every other document."""
    rows = [{"question": f"question {number}", "answer": "ok" if number % 2 else "no"} for number in range(6)]
    return write(folder, text, "capitals.jsonl", rows, name)


def asked(task: str, url: str, model_path: Path, **options) -> dict:
    """A request's config."""
    return {
        "task": {"task": task, **options}, "url": url, "model": NAME, "model_path": str(model_path), "max_model_len": 1024,
        "seed": 7, "concurrency": 4,
    }  # fmt: skip


def written(payload: Path) -> tuple[list[TaskResult], dict, dict[str, list[dict]]]:
    """The records, lm-eval's results and its samples by task."""
    found = [TaskResult.model_validate(record) for record in json.loads((payload / "records.json").read_text())]
    (results,) = payload.glob("*/results_*.json")
    samples = {
        file.name.split("_2")[0].removeprefix("samples_"): [json.loads(line) for line in file.read_text().splitlines()]
        for file in payload.glob("*/samples_*.jsonl")
    }
    return found, json.loads(results.read_text()), samples


@pytest.mark.slow
def test_a_task_that_generates_is_chatted_greedily(tmp_path):
    """The real lm-eval, offline, with local files: its own JSON, and a record that says the same; what is wrong is told."""
    good = capitals(tmp_path / "tasks")
    code = capitals(tmp_path / "tasks", GENERATE.replace("{{question}}", "{{question.__class__.__mro__}}"), "code.yaml")
    foreign = capitals(tmp_path / "tasks", GENERATE.replace("metric: bleu", "metric: toxicity"), "foreign.yaml")
    with fake_vllm(NAME, answer="ok") as url:
        requests = [
            (tmp_path / "good", asked(good, url, tmp_path, limit=4, metrics=["exact_match"]), {}),
            (tmp_path / "code", asked(code, url, tmp_path), {}),
            (tmp_path / "foreign", asked(foreign, url, tmp_path), {}),
            (tmp_path / "metric", asked(good, url, tmp_path, metrics=["bleu"]), {}),
        ]
        detail, *errors = programs.run_many(
            "pipeline.evaluation.lm_eval_tasks", requests, tmp_path, environment="judges"
        )
    (record,), results, samples = written(tmp_path / "good" / "payload")
    assert (record.task, record.metric, record.values) == ("capitals", "exact_match", (0.0, 1.0, 0.0, 1.0))
    assert results["results"]["capitals"]["exact_match,none"] == detail["metrics"]["capitals/exact_match"] == 0.5
    assert (results["config"]["model"], results["config"]["fewshot_seed"]) == ("local-chat-completions", 7)
    assert results["config"]["model_args"]["num_concurrent"] == 4
    assert results["configs"]["capitals"]["generation_kwargs"]["temperature"] == 0.0
    prompt = json.loads(samples["capitals"][0]["arguments"]["gen_args_0"]["arg_0"][0])
    assert prompt == [{"role": "user", "content": "question 0"}]
    assert all(isinstance(error, TunegateError) for error in errors)
    said = [str(error) for error in errors]
    assert "SecurityError: access to attribute '__class__' of 'str' object is unsafe" in said[0]
    assert "uses the metric toxicity, which isn't lm-eval's own" in said[1]
    assert "bleu is not a mean over its documents" in said[2]
