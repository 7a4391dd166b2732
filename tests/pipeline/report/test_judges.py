"""lm-eval's tasks and the LLM judge in a report."""

from __future__ import annotations

import pytest
from support.sample_build import judged, sample_build, tasks

from pipeline.artifacts import Build
from pipeline.report import judges


@pytest.fixture(scope="module")
def build(tmp_path_factory) -> Build:
    made = sample_build(tmp_path_factory.mktemp("store"), count=100)
    return made.model_copy(update={"tasks": tasks(), "judged": (judged(),)})


def test_tasks_are_compared_document_by_document(build):
    """Against the base where there is no champion, and not at all where the documents are others."""
    first, second = judges.tasks(build)
    assert (first.task, first.metric, first.documents, first.against) == ("local_faq", "acc", 100, "base")
    assert first.change.value == pytest.approx(0.1)
    assert first.change.low > 0
    assert second.change.value == pytest.approx(2.0)
    others = tuple(one.model_copy(update={"ids": one.ids[::-1]}) for one in build.tasks["base"])
    moved = build.model_copy(update={"tasks": {**build.tasks, "base": others}})
    assert [(one.against, one.change) for one in judges.tasks(moved)] == [(None, None)] * 2


def test_a_metric_beyond_one_that_never_varies_is_itself():
    """Wilson's interval is for shares."""
    assert judges.mean([7.0, 7.0], 0.95).model_dump() == {"value": 7.0, "low": 7.0, "high": 7.0}
    assert judges.mean([1.0, 1.0], 0.95).low < 1


def test_the_judges_wins_count_in_both_orders_only(build):
    """Of 60 items a third is lost, and every fifth went with the order."""
    (found,) = judges.judged(build)
    assert (found.won, found.lost, found.items, found.failed) == (32, 16, 60, 1)
    assert found.agreement.value == pytest.approx(0.8)
