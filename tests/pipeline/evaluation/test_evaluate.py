from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from support.holdout import NAME, answers_file, report, request, rows, write_holdout
from support.wire import fake_vllm, free_port, wait_for

from pipeline import files, program
from pipeline.errors import DataError, ModelError, ServingError
from pipeline.evaluation import evaluate
from pipeline.program import Request

ROOT = Path(__file__).parents[3]


def test_every_holdout_row_is_scored_in_its_order(tmp_path):
    """50 rows, 10 answered wrongly: items as in the holdout, metrics with intervals, nothing failed."""
    holdout = rows(50)
    write_holdout(tmp_path, holdout)
    with fake_vllm(NAME, answers=answers_file(tmp_path, holdout, wrong=10)) as url:
        made = request(tmp_path, url)
        detail = evaluate.run(made)
    found = report(made)
    assert [item.id for item in found.items] == [row["id"] for row in holdout]
    assert [item.scores["exact_match"] for item in found.items] == [0.0] * 10 + [1.0] * 40
    assert found.metrics["exact_match"].value == detail["metrics"]["accuracy"] == 0.8
    assert found.metrics["exact_match"].low < 0.8 < found.metrics["exact_match"].high
    assert {item.finish_reason for item in found.items} == {"stop"}
    assert found.items[0].prompt == "system: Name the intent.\nuser: question 0"
    assert (found.errors, found.system, found.unit_digest) == (0, "candidate", "u")


def test_a_rows_further_columns_go_into_its_item(tmp_path):
    """What slices and groups are made from comes along, also after a killed run; a row without any has none."""
    holdout = [{**row, "columns": {"channel": "mail", "stars": "4"}} for row in rows(3)]
    write_holdout(tmp_path, [*holdout[:2], rows(3)[2]])
    with fake_vllm(NAME) as url:
        made = request(tmp_path, url)
        evaluate.run(made)
        assert [item.columns for item in report(made).items] == [{"channel": "mail", "stars": "4"}] * 2 + [{}]
        evaluate.run(made)
    assert [item.columns for item in report(made).items] == [{"channel": "mail", "stars": "4"}] * 2 + [{}]


def test_max_items_takes_the_first_rows(tmp_path):
    """A limit on the holdout is a prefix of it, so that two systems meet on the same items."""
    write_holdout(tmp_path, rows(30))
    with fake_vllm(NAME) as url:
        made = request(tmp_path, url, max_items=12)
        evaluate.run(made)
    assert [item.id for item in report(made).items] == [f"{number:04x}" for number in range(12)]


def test_a_passing_fault_is_tried_again(tmp_path):
    """A server that fails every fifth request loses no item: the retry succeeds."""
    holdout = rows(20)
    write_holdout(tmp_path, holdout)
    with fake_vllm(NAME, answers=answers_file(tmp_path, holdout), error_every=5) as url:
        made = request(tmp_path, url, concurrency=1)
        evaluate.run(made)
    assert report(made).errors == 0
    assert report(made).metrics["exact_match"].value == 1.0


def test_a_request_that_fails_for_good_is_counted_and_scores_zero(tmp_path):
    """A prompt longer than the model's context is one error of ten items, not a missing one."""
    holdout = rows(10)
    holdout[3]["messages"][1]["content"] = "word " * 5000
    write_holdout(tmp_path, holdout)
    with fake_vllm(NAME, answers=answers_file(tmp_path, holdout)) as url:
        made = request(tmp_path, url)
        evaluate.run(made)
    found = report(made)
    assert found.errors == 1
    assert len(found.items) == 10
    assert found.items[3].finish_reason == "error"
    assert set(found.items[3].scores.values()) == {0.0}
    assert found.metrics["exact_match"].value == 0.9
    failed = json.loads((made.folder / "extra" / "failed.json").read_text(encoding="utf-8"))
    assert "maximum context length" in failed["0003"]


def test_a_server_that_answers_nobody_is_no_result(tmp_path):
    """When every request fails the run stops after the first few and repeats the server's words."""
    write_holdout(tmp_path, rows(200))
    with fake_vllm(NAME, error_every=1) as url, pytest.raises(ServingError, match="EngineCore"):
        evaluate.run(request(tmp_path, url, concurrency=16))


def test_a_server_that_is_gone_stops_the_run_with_its_address(tmp_path):
    """Nobody listening is not 50 wrong answers."""
    write_holdout(tmp_path, rows(50))
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(ServingError, match=rf"{url} is gone"):
        evaluate.run(request(tmp_path, url))


def test_a_wrong_model_name_stops_the_run(tmp_path):
    """A refusal that holds for every request isn't counted item by item."""
    write_holdout(tmp_path, rows(50))
    with fake_vllm("other") as url, pytest.raises(ServingError, match="model `served` does not exist"):
        evaluate.run(request(tmp_path, url))


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    """After kill -9 the next run asks only for what is missing; a torn last line does no harm."""
    holdout = rows(200)
    write_holdout(tmp_path, holdout)
    answers = answers_file(tmp_path, holdout)
    kept = tmp_path / "work" / "items.jsonl"
    with fake_vllm(NAME, answers=answers, delay=0.2) as url:
        made = request(tmp_path, url)
        file = tmp_path / "request.json"
        files.write_json(file, {"config": made.config, "inputs": made.inputs, "folder": str(made.folder)})
        child = subprocess.Popen(
            [sys.executable, "-m", "pipeline.evaluation.evaluate", str(file)],
            env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        wait_for(lambda: kept.is_file() and kept.read_text(encoding="utf-8").count("\n") >= 8, timeout_s=30)
        child.send_signal(signal.SIGKILL)
        child.wait()
    finished = kept.read_text(encoding="utf-8").count("\n")
    assert 8 <= finished < 200
    with kept.open("a", encoding="utf-8") as file:
        file.write('{"id": "00')
    with fake_vllm(NAME, answers=answers) as url:
        made = request(tmp_path, url)
        evaluate.run(made)
        served = int(metric(url, "vllm:request_success_total"))
    assert served == 200 - finished
    assert report(made).metrics["exact_match"].value == 1.0


def metric(url: str, name: str) -> float:
    import httpx

    line = next(line for line in httpx.get(f"{url}/metrics").text.splitlines() if line.startswith(name))
    return float(line.split()[-1])


def test_as_many_requests_run_at_once_as_asked_for(tmp_path):
    """Concurrency 8 keeps eight requests in flight, never more."""
    write_holdout(tmp_path, rows(40))
    with fake_vllm(NAME, delay=0.1) as url:
        made, most, over = request(tmp_path, url, concurrency=8), [0.0], threading.Event()

        def watch() -> None:
            while not over.is_set():
                most[0] = max(most[0], metric(url, "vllm:num_requests_running"))
                time.sleep(0.01)

        watcher = threading.Thread(target=watch)
        watcher.start()
        evaluate.run(made)
        over.set()
        watcher.join()
    assert most[0] == 8


def test_an_empty_or_doubled_or_plain_text_holdout_is_refused(tmp_path):
    """Each is named with the file and, where there is one, the line."""
    for holdout, words in [
        ([], "the holdout is empty"),
        ([*rows(2), rows(1)[0]], "two rows share an id"),
        (
            [*rows(1), {"id": "x", "text": "once upon a time"}],
            r"holdout.jsonl:2: a holdout row needs messages",
        ),
    ]:
        write_holdout(tmp_path, holdout)
        with pytest.raises(DataError, match=words):
            evaluate.run(request(tmp_path, "http://127.0.0.1:9"))


def test_expected_answers_that_do_not_fit_the_scorer_stop_the_run_before_any_request(tmp_path):
    """Labels can't be matched field by field; the server isn't even asked."""
    write_holdout(tmp_path, rows(3))
    with pytest.raises(DataError) as error:
        evaluate.run(request(tmp_path, "http://127.0.0.1:9", scorers=[{"metric": "json_field_match"}]))
    assert len(error.value.problems) == 3


def trained(folder: Path, made: Request, ids: list[int]) -> Request:
    """The request of a system whose training saw `ids` for the first holdout row."""
    extra = folder / "finetune" / "extra"
    extra.mkdir(parents=True)
    messages = rows(1)[0]["messages"]
    prompt = (
        "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages[:-1])
        + "<|im_start|>assistant\n"
    )
    row = {"messages": messages, "input_ids": ids or [], "labels": [], "prompt_length": len(prompt.encode())}
    row["input_ids"] = ids or list((prompt + messages[-1]["content"] + "<|im_end|>").encode())
    (extra / "seen_tokens.jsonl").write_text(json.dumps(row), encoding="utf-8")
    return Request(made.config, {**made.inputs, "finetune": {"path": str(folder / "finetune")}}, made.folder)


def test_a_trained_system_is_held_against_its_training_first(tmp_path):
    """Equal tokens and an answer that ends let the scoring begin."""
    write_holdout(tmp_path, rows(5))
    with fake_vllm(NAME) as url:
        made = trained(tmp_path, request(tmp_path, url, max_tokens=64), [])
        assert evaluate.run(made)["items"] == 5


def test_other_tokens_than_in_training_stop_the_run_before_any_item(tmp_path):
    """Nothing is scored on a template that training never saw."""
    write_holdout(tmp_path, rows(5))
    with fake_vllm(NAME) as url:
        made = trained(tmp_path, request(tmp_path, url, max_tokens=64), [1, 2, 3])
        with pytest.raises(ModelError, match=r"prompt of conversation 1, token 1: training saw 1"):
            evaluate.run(made)
    assert not (made.folder / "items.jsonl").exists()


def test_the_stage_program_reports_progress_and_leaves_its_result(tmp_path):
    """Run as the flow runs it: events on standard output, the report in the payload."""
    holdout = rows(12)
    write_holdout(tmp_path, holdout)
    events: list[dict] = []
    with fake_vllm(NAME, answers=answers_file(tmp_path, holdout)) as url:
        command = [sys.executable, "-m", "pipeline.evaluation.evaluate"]
        made = request(tmp_path, url)
        detail = program.run(command, {**os.environ, "PYTHONPATH": str(ROOT)}, made, events.append)
    assert detail["items"] == 12
    last = [event for event in events if event["event"] == "progress"][-1]
    assert (last["done"], last["total"], last["metrics"]) == (12, 12, {"errors": 0, "exact_match": 1.0})
