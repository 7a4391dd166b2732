from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from support.wire import fake_vllm, free_port

from pipeline import program
from pipeline.artifacts import LoadTest
from pipeline.environments import interpreters
from pipeline.errors import DataError, ServingError
from pipeline.evaluation import loadtest
from pipeline.intervals.load import measured
from pipeline.program import Request

VOCABULARY = {"hello": 0, "[UNK]": 1}


def tokenizer_folder(folder: Path) -> Path:
    """The smallest folder whose tokenizer vLLM's bench loads; the fake server counts tokens itself."""
    folder.mkdir(parents=True, exist_ok=True)
    model = {"type": "WordLevel", "vocab": VOCABULARY, "unk_token": "[UNK]"}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": model,
    }
    empty = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor", "decoder"))
    (folder / "tokenizer.json").write_text(json.dumps({**tokenizer, **empty}), encoding="utf-8")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "[UNK]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 2}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def request(folder: Path, url: str, **options) -> Request:
    """A load test's request over ten holdout conversations."""
    payload = folder / "prepare" / "payload"
    payload.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "id": f"{number:04x}",
            "messages": [
                {"role": "system", "content": "Be short."},
                {"role": "user", "content": f"question {number}"},
                {"role": "assistant", "content": "yes"},
            ],
        }
        for number in range(10)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (payload / "holdout.jsonl").write_text(lines, encoding="utf-8")
    (folder / "work").mkdir(exist_ok=True)
    section = {"max_concurrency": [1, 4], "num_prompts": 12, "max_tokens": 16, "repeats": 2, **options}
    config = {
        "loadtest": section, "system": "candidate", "url": url, "model": "served", "unit_digest": "u",
        "model_path": str(tokenizer_folder(folder / "model")), "seed": 1,
    }  # fmt: skip
    return Request(config, {"prepare": {"path": str(folder / "prepare")}}, folder / "work")


def run(made: Request) -> tuple[LoadTest, list[program.Event]]:
    """The stage program in the serve environment, as the flow runs it."""
    events: list[program.Event] = []
    serve = interpreters.find("serve")
    command = interpreters.command(serve, "pipeline.evaluation.loadtest")
    program.run(command, interpreters.child_environ(serve), made, events.append)
    text = (made.payload / "report.json").read_text(encoding="utf-8")
    return LoadTest.model_validate_json(text), events


@pytest.fixture(scope="module")
def sweep(tmp_path_factory) -> tuple[LoadTest, list[program.Event]]:
    """Levels 1 and 4, twice, 12 requests each; the server fails every tenth and says six words."""
    folder = tmp_path_factory.mktemp("sweep")
    answers = folder / "answers.json"
    known = {f"question {number}": "one two three four five six" for number in range(10)}
    answers.write_text(json.dumps(known), encoding="utf-8")
    with fake_vllm("served", answers=answers, delay=0.1, token_delay=0.02, error_every=10) as url:
        return run(request(folder, url))


@pytest.mark.slow
def test_a_sweep_measures_every_level_in_one_process(sweep):
    """Latencies are at least what the server waits, and more users give more throughput."""
    found, events = sweep
    one, four = found.levels
    assert (one.max_concurrency, four.max_concurrency) == (1, 4)
    for level in (one, four):
        assert set(level.metrics) == set(loadtest.METRICS)
        assert {len(values) for values in level.metrics.values()} == {2}
        assert min(level.metrics["p50_ttft_ms"]) >= 100
        assert min(level.metrics["p50_e2el_ms"]) >= 200
    assert max(four.metrics["request_throughput"]) > 2 * max(one.metrics["request_throughput"])
    last = [event for event in events if event["event"] == "progress"][-1]
    assert (last["done"], last["total"]) == (48, 48)


@pytest.mark.slow
def test_failed_requests_are_counted_and_leave_no_sample(sweep):
    """Of 48 requests after 4 to warm up the 10th, 20th, 30th, 40th and 50th failed."""
    levels = sweep[0].levels
    assert sum(level.completed for level in levels) == 43
    assert sum(level.failed for level in levels) == 5
    for level in levels:
        assert sum(map(len, level.samples["e2el_ms"])) == level.completed
        assert {tokens for repeat in level.samples["output_tokens"] for tokens in repeat} == {6.0}


@pytest.mark.slow
def test_samples_and_figures_are_of_the_same_requests(sweep):
    """Bench's percentiles are those of the samples kept, and the gate's intervals hold them."""
    for level in sweep[0].levels:
        for name in ("ttft", "e2el", "itl"):
            for percentile in (50, 95, 99):
                kept = [np.percentile(repeat, percentile) for repeat in level.samples[f"{name}_ms"]]
                assert level.metrics[f"p{percentile}_{name}_ms"] == pytest.approx(kept, abs=0.002)
        for repeat, gaps in zip(level.samples["itl_ms"], level.samples["gaps"], strict=True):
            assert len(repeat) == sum(gaps)
        for metric in ("p50_ttft_ms", "p50_e2el_ms", "output_throughput", "request_throughput"):
            interval = measured(level, metric, 0.95).interval
            assert interval.low <= max(level.metrics[metric])
            assert interval.high >= min(level.metrics[metric])


@pytest.mark.slow
def test_a_server_that_is_gone_is_no_measurement(tmp_path):
    """All requests failing stops the stage, with the address and the reason."""
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(ServingError, match=r"requests at concurrency 4 failed: .*Cannot connect"):
        run(request(tmp_path, url))


def test_a_holdout_without_conversations_is_refused(tmp_path):
    """There is nothing to ask; the error names the file."""
    file = tmp_path / "holdout.jsonl"
    file.write_text('{"id": "1", "text": "once"}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"holdout.jsonl: the holdout must hold at least one conversation"):
        loadtest.read_prompts(file)


def test_a_level_is_recorded_without_its_failed_requests():
    """A request that bench counts as failed leaves no sample, and is counted."""
    level = loadtest.Level(2)
    zeros = dict.fromkeys(loadtest.METRICS, 1.0)
    run = {
        "completed": 2,
        "failed": 1,
        "output_lens": [3, 0, 1],
        "ttfts": [0.1, 0.0, 0.2],
    }
    level.runs.append({**zeros, **run, "itls": [[0.1, 0.1], [], []]})
    found = level.record()
    assert (found.completed, found.failed) == (2, 1)
    assert found.samples["ttft_ms"] == ((100.0, 200.0),)
    assert found.samples["e2el_ms"] == ((300.0, 200.0),)
    assert found.samples["gaps"] == ((2.0, 0.0),)
    assert found.samples["itl_ms"] == ((100.0, 100.0),)


def test_this_interpreter_can_read_the_stage_without_vllm():
    """Control imports the module; vLLM is only imported when a load is put on."""
    assert "vllm" not in sys.modules
