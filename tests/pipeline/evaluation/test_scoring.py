from __future__ import annotations

from pipeline.artifacts import Item
from pipeline.config.schema import Scorer
from pipeline.evaluation import scoring


def item(number: int, expected: str, answer: str | None, scorers: list[Scorer]) -> Item:
    return Item(
        id=f"{number:04x}", prompt="?", expected=expected, answer=answer or "", finish_reason="stop",
        scores=scoring.item_scorer(scorers)(expected, answer),
    )  # fmt: skip


def test_a_failed_request_scores_zero_everywhere():
    """Also where an empty answer would have matched."""
    scorers = [Scorer(metric="exact_match"), Scorer(metric="json_field_match")]
    assert scoring.item_scorer(scorers)('{"a": 1}', None) == {
        "exact_match": 0.0, "json_field_match": 0.0, "json_field_match/a": 0.0,
    }  # fmt: skip
    assert scoring.item_scorer([Scorer(metric="exact_match")])("", None) == {"exact_match": 0.0}


def test_every_metric_comes_with_an_interval():
    """Aggregates hold their mean, lie within 0 to 1, and accuracy brings macro-F1."""
    scorers = [Scorer(metric="accuracy"), Scorer(metric="token_f1")]
    answers = [("a", "a"), ("a", "a b"), ("b", "b"), ("b", "c"), ("a b", "a")] * 8
    items = [item(number, *pair, scorers) for number, pair in enumerate(answers)]
    intervals = scoring.metrics(items, 0.95)
    assert list(intervals) == ["accuracy", "token_f1", "f1_macro"]
    assert intervals["accuracy"].value == 0.4
    for interval in intervals.values():
        assert 0 <= interval.low < interval.value < interval.high <= 1


def test_a_field_is_averaged_over_the_items_that_expect_it():
    """Rows without the field don't pull its mean down."""
    scorers = [Scorer(metric="json_field_match")]
    items = [
        item(1, '{"a": 1, "b": 2}', '{"a": 1, "b": 2}', scorers),
        item(2, '{"a": 1}', '{"a": 2}', scorers),
    ]
    intervals = scoring.metrics(items, 0.95)
    assert intervals["json_field_match/b"].value == 1.0
    assert intervals["json_field_match/a"].value == 0.5


def test_expected_answers_that_no_scorer_can_use_are_all_named():
    """Two of three rows are no JSON objects; both are named, and no other scorer minds."""
    rows = [("01", "{}"), ("02", "bug"), ("03", "[1]")]
    intervals = scoring.unfit([Scorer(metric="json_field_match")], rows)
    assert [problem.what.split(":")[0] for problem in intervals] == ["holdout row 02", "holdout row 03"]
    assert scoring.unfit([Scorer(metric="exact_match")], rows) == []
