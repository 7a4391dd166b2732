"""An LLM judge over a real wire: biased, honest, broken."""

from __future__ import annotations

import json

import pytest
from fakes.fake_judge import KEY, endpoint, honest, verdict
from support.wire import free_port

from pipeline.artifacts import JudgeReport
from pipeline.errors import ConfigError, ServingError
from pipeline.evaluation import client, llm_judge
from pipeline.program import Request


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(client, "BACKOFF_S", 0.01)


def pairs(count: int, better: int = 0) -> list[dict]:
    """Items of which the candidate is better in the first `better`, and the other in the rest."""
    return [
        {
            "id": f"{number:04x}", "prompt": f"question {number}", "expected": "yes",
            "candidate": "yes, indeed" if number < better else "no", "other": "perhaps",
        }
        for number in range(count)
    ]  # fmt: skip


def request(folder, base_url: str, asked: list[dict], **options) -> Request:
    section = {"base_url": base_url, "model": "judge-1", "against": "base", "concurrency": 4, **options}
    return Request({"judge": section, "gate": {"confidence": 0.95}, "seed": 7}, {"pairs": asked}, folder)


def report(made: Request) -> JudgeReport:
    return JudgeReport.model_validate_json((made.payload / "report.json").read_text(encoding="utf-8"))


def written(folder) -> str:
    """All that lies in the folder."""
    return "\n".join(file.read_text(encoding="utf-8") for file in sorted(folder.rglob("*")) if file.is_file())


def test_a_judge_that_prefers_a_place_agrees_with_itself_never(tmp_path):
    """Always the first answer: parity and no agreement, however much the answers differ."""
    with endpoint(lambda _first, _second: verdict("A")) as there:
        made = request(tmp_path, there.base_url, pairs(30, better=20))
        llm_judge.run(made)
    found = report(made)
    assert (found.win_rate.value, found.agreement.value, found.failed) == (0.5, 0.0, 0)
    assert found.agreement.low == 0.0 < found.agreement.high < 0.2
    assert {(item.candidate_first, item.candidate_second) for item in found.items} == {("candidate", "other")}


def test_an_honest_judge_agrees_with_itself(tmp_path):
    """20 of 30 answers are better: agreement 1, and the win rate with Wilson's interval."""
    with endpoint(honest) as there:
        made = request(tmp_path, there.base_url, pairs(30, better=20))
        detail = llm_judge.run(made)
    found = report(made)
    assert found.agreement.value == 1.0
    assert found.win_rate.value == detail["win_rate"] == pytest.approx(2 / 3)
    assert found.win_rate.low < 2 / 3 < found.win_rate.high
    assert [item.score for item in found.items] == [1.0] * 20 + [0.0] * 10
    assert [item.id for item in found.items] == [pair["id"] for pair in made.inputs["pairs"]]
    assert (found.model, found.against, found.items[0].reason) == ("judge-1", "base", "A it is")


def test_ties_count_half(tmp_path):
    """A tie in both orders is a score of a half, and agreement."""
    with endpoint(lambda *_: verdict("tie")) as there:
        made = request(tmp_path, there.base_url, pairs(4))
        llm_judge.run(made)
    assert (report(made).win_rate.value, report(made).agreement.value) == (0.5, 1.0)


def test_each_item_is_asked_about_twice_greedily_with_the_seed(tmp_path):
    """As OpenAI's clients ask, below base_url; the answers change places."""
    with endpoint(honest) as there:
        llm_judge.run(request(tmp_path, there.base_url + "/", pairs(1), max_tokens=99, concurrency=1))
    assert there.heads == [("/v1/chat/completions", None)] * 2
    settings = [{key: body[key] for key in ("model", "temperature", "seed", "max_tokens")} for body in there.asked]
    assert settings == [{"model": "judge-1", "temperature": 0.0, "seed": 7, "max_tokens": 99}] * 2
    first, second = (body["messages"][1]["content"] for body in there.asked)
    assert first.index("\nno\n") < first.index("\nperhaps\n")
    assert second.index("\nperhaps\n") < second.index("\nno\n")


def test_items_without_a_usable_verdict_are_counted(tmp_path):
    """Chatter and refused requests are no ties; what stays is judged, and why is written beside it."""

    def moody(first: str, second: str) -> str | tuple[int, str]:
        if "yes, indeed" in (first, second):
            return "I would rather not say."
        return (400, "too long") if "maybe" in (first, second) else verdict("B")

    asked = pairs(8, better=2)
    asked[5]["candidate"] = "maybe"
    with endpoint(moody) as there:
        made = request(tmp_path, there.base_url, asked)
        llm_judge.run(made)
    found = report(made)
    assert found.failed == 3
    assert [item.id for item in found.items] == ["0002", "0003", "0004", "0006", "0007"]
    failed = json.loads((tmp_path / "extra" / "failed.json").read_text())
    assert set(failed) == {"0000", "0001", "0005"}
    assert "I would rather not say." in failed["0000"]
    assert "HTTP 400: too long" in failed["0005"]


def test_a_passing_fault_is_tried_again(tmp_path):
    """A limit on the rate loses no item."""
    seen: list[int] = []

    def busy(first: str, second: str) -> str | tuple[int, str]:
        seen.append(1)
        return (429, "slow down") if len(seen) % 3 == 1 else honest(first, second)

    with endpoint(busy) as there:
        made = request(tmp_path, there.base_url, pairs(6), concurrency=1)
        llm_judge.run(made)
    assert report(made).failed == 0


def test_a_judge_that_never_says_anything_usable_is_no_result(tmp_path):
    """The run stops after the first few and shows what was said."""
    with endpoint(lambda *_: "Both are fine.") as there, pytest.raises(ServingError, match="Both are fine") as caught:
        llm_judge.run(request(tmp_path, there.base_url, pairs(200)))
    assert '"winner"' in caught.value.problems[0].allowed
    assert len(there.asked) < 60


def test_a_killed_run_asks_only_for_what_is_missing(tmp_path):
    """What is in judged.jsonl isn't asked again; a torn last line does no harm."""
    with endpoint(honest) as there:
        made = request(tmp_path, there.base_url, pairs(10, better=5))
        llm_judge.run(made)
    lines = (tmp_path / "judged.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "judged.jsonl").write_text("".join(lines[:6]) + lines[6][:20])
    before = report(made)
    with endpoint(honest) as there:
        made = request(tmp_path, there.base_url, pairs(10, better=5))
        llm_judge.run(made)
    assert len(there.asked) == 2 * 4
    assert report(made) == before


def test_the_key_is_sent_and_written_nowhere(tmp_path, monkeypatch, capfd):
    """Not even when the endpoint repeats it, in an item's failure or in its refusal of everybody."""
    monkeypatch.setenv("JUDGE_KEY", KEY)

    def leaky(first: str, second: str) -> str | tuple[int, str]:
        return (400, f"{KEY} asks too much") if "yes, indeed" in (first, second) else honest(first, second)

    with endpoint(leaky) as there:
        llm_judge.run(request(tmp_path, there.base_url, pairs(6, better=2), api_key_env="JUDGE_KEY"))
    assert {head[1] for head in there.heads} == {f"Bearer {KEY}"}
    with (
        endpoint(lambda *_: (401, f"no such key: {KEY}")) as there,
        pytest.raises(ServingError, match=r"HTTP 401: no such key: \[key\]") as caught,
    ):
        llm_judge.run(request(tmp_path / "again", there.base_url, pairs(6), api_key_env="JUDGE_KEY"))
    assert KEY not in written(tmp_path) + str(caught.value) + "".join(capfd.readouterr())
    assert "[key] asks too much" in written(tmp_path)


def test_a_key_that_is_not_there_is_named_before_anything_is_sent(tmp_path, monkeypatch):
    """With the variable to set."""
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with endpoint(honest) as there, pytest.raises(ConfigError, match="JUDGE_KEY is not set") as caught:
        llm_judge.run(request(tmp_path, there.base_url, pairs(1), api_key_env="JUDGE_KEY"))
    assert "export JUDGE_KEY" in caught.value.problems[0].remedy
    assert there.asked == []


@pytest.mark.parametrize("key", ["sk-abc\r", "sk abc", "sk-\x00"])
def test_what_can_be_no_key_is_refused_without_being_told(key):
    """A line end that Windows left would come back in an error of the HTTP client, key and all."""
    with pytest.raises(ConfigError, match="JUDGE_KEY holds a blank") as caught:
        llm_judge.api_key("JUDGE_KEY", {"JUDGE_KEY": key})
    assert "sk" not in str(caught.value)


def test_nobody_listening_is_no_verdict(tmp_path):
    """The address is named."""
    url = f"http://127.0.0.1:{free_port()}/v1"
    with pytest.raises(ServingError, match="is gone"):
        llm_judge.run(request(tmp_path, url, pairs(3)))
