"""Slices: where the candidate got worse stands first."""

from __future__ import annotations

import pytest
from support.sample_build import evaluation, sample_build

from pipeline.artifacts import Build, Item
from pipeline.report import slices


@pytest.fixture(scope="module")
def build(tmp_path_factory) -> Build:
    made = sample_build(tmp_path_factory.mktemp("store"))
    return made.model_copy(
        update={"evaluations": {**made.evaluations, "incumbent": evaluation("incumbent", "champion")}}
    )


def spoilt(build: Build, value: str) -> Build:
    """The candidate with every answer wrong in one channel."""
    candidate = build.evaluations["candidate"]
    items = tuple(
        item.model_copy(update={"scores": dict.fromkeys(item.scores, 0.0)})
        if item.columns["channel"] == value
        else item
        for item in candidate.items
    )
    evaluations = {**build.evaluations, "candidate": candidate.model_copy(update={"items": items})}
    return build.model_copy(update={"evaluations": evaluations})


def test_the_slice_that_got_worse_comes_first(build):
    """With its count, score and paired difference to the champion."""
    found = slices.extremes(spoilt(build, "phone"), 6)
    assert found.against == "incumbent"
    worst = found.shown[0]
    assert (worst.by, worst.value, worst.items, worst.score.value) == ("channel", "phone", 66, 0.0)
    assert worst.change.high < -0.5
    assert len(found.shown) == 6 < found.found
    changes = [one.change.value for one in found.shown]
    assert changes == sorted(changes)


def test_expected_fields_and_labels_are_slices_and_texts_are_not():
    """Named as a policy names them: a JSON object's plain fields, a short label; no list and no prose."""

    def splits(expected: str) -> list[str]:
        item = Item(
            id="1",
            prompt="?",
            expected=expected,
            answer="",
            finish_reason="stop",
            scores={},
            columns={"channel": "mail"},
        )
        return list(slices.splits(item))

    fields = '{"category": "bug", "urgent": true, "entities": ["A"]}'
    assert splits(fields) == ["channel", "expected.category", "expected.urgent"]
    assert splits("card_arrival") == ["channel", "expected"]
    assert splits("a long answer in prose, " * 5) == ["channel"]


def test_too_small_and_whole_slices_are_left_out(build):
    """A value that every row has, or that few have, says nothing; without a system to compare with the scores order."""
    candidate = build.evaluations["candidate"]
    items = tuple(
        item.model_copy(update={"expected": "", "columns": {"same": "x", "rare": str(n // 9), "half": str(n % 2)}})
        for n, item in enumerate(candidate.items)
    )
    alone = build.model_copy(update={"evaluations": {"candidate": candidate.model_copy(update={"items": items})}})
    found = slices.extremes(alone, 6)
    assert {(one.by, one.value) for one in found.shown} == {("half", "0"), ("half", "1")}
    assert found.against is None
    assert found.shown[0].score.value <= found.shown[1].score.value
    assert slices.extremes(build.model_copy(update={"evaluations": {}}), 6) is None
