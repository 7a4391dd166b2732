from __future__ import annotations

import pytest

from pipeline import program
from pipeline.artifacts import Judgement
from pipeline.errors import ServingError
from pipeline.evaluation import resumable
from pipeline.evaluation.resumable import Resumable


def judgement(identity: str) -> Judgement:
    return Judgement(id=identity, candidate_first="tie", candidate_second="tie", reason="")


@pytest.fixture
def verdicts(tmp_path, monkeypatch):
    """A record of thirty items, and the progress lines that it emits."""
    lines: list[tuple] = []
    monkeypatch.setattr(program, "progress", lambda done, total, unit, **figures: lines.append((done, total, figures)))

    def new(total: int = 30) -> Resumable[Judgement]:
        return Resumable[Judgement](
            tmp_path / "items.jsonl",
            total,
            lambda so_far: {"failed": len(so_far.failures)},
            lambda count, reason: ServingError(f"{count} failed, the last: {reason}", remedy="look"),
        )

    return new, lines


def test_a_killed_run_goes_on_where_it_was(verdicts):
    """Finished items are read back, a line cut off by the kill isn't, and ids of another holdout aren't."""
    new, _ = verdicts
    first = new()
    for identity in ("a", "b", "old"):
        first.keep(judgement(identity))
    with first.file.open("a", encoding="utf-8") as file:
        file.write('{"id": "c", "candi')
    again = new()
    again.resume(Judgement, {"a", "b", "c"})
    assert again.items == {"a": judgement("a"), "b": judgement("b")}


def test_a_failure_is_counted_and_not_written(verdicts):
    """The next run asks again; progress tells both."""
    new, lines = verdicts
    record = new()
    record.keep(judgement("a"))
    record.fail("b", "HTTP 400")
    assert lines == [(1, 30, {"failed": 0}), (2, 30, {"failed": 1})]
    again = new()
    again.resume(Judgement, {"a", "b"})
    assert list(again.items) == ["a"]


@pytest.mark.parametrize(("total", "limit"), [(30, resumable.FAILURES_BEFORE_GIVING_UP), (3, 3)])
def test_it_gives_up_where_nothing_ever_succeeds(verdicts, total, limit):
    """After as many failures as are enough, or all of fewer; one success, and it never does."""
    new, _ = verdicts
    hopeless = new(total)
    for number in range(limit - 1):
        hopeless.fail(str(number), "gone")
    with pytest.raises(ServingError, match=f"{limit} failed, the last: HTTP 500"):
        hopeless.fail("last", "HTTP 500")
    fine = new(total)
    fine.keep(judgement("a"))
    for number in range(total - 1):
        fine.fail(str(number), "gone")
