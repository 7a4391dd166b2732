from __future__ import annotations

import json

import pytest

from pipeline.artifacts import Item
from pipeline.config.schema import Scorer
from pipeline.errors import ConfigError
from pipeline.evaluation import scoring

TICKET = json.dumps({"category": "bug", "priority": "high", "product": "app", "entities": ["v2", "iOS"]})


def item(number: int, expected: str, answer: str | None, scorers: list[Scorer]) -> Item:
    return Item(
        id=f"{number:04x}", prompt="?", expected=expected, answer=answer or "", finish_reason="stop",
        scores=scoring.item_scorer(scorers)(expected, answer),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "score"),
    [("Paris", 1), (" Paris\n", 1), ("paris", 0), ("Paris.", 0), ("Paris, France", 0), ("", 0)],
)
def test_exact_match_forgives_only_white_space_around(answer, score):
    """Every other character counts."""
    assert scoring.exact_match("Paris", answer) == score


@pytest.mark.parametrize(
    ("answer", "score"),
    [("Card_Arrival", 1), ('"card_arrival".', 1), ("card arrival", 0), ("the card_arrival", 0)],
)
def test_a_label_forgives_case_and_wrapping(answer, score):
    """Quotes, full stops and case don't change a label; another word does."""
    assert scoring.accuracy("card_arrival", answer) == score


def test_labels_that_differ_in_signs_stay_apart():
    """Folding must not make C of C++ or drop a question mark that belongs to the label."""
    assert scoring.accuracy("C++", "C") == 0
    assert scoring.accuracy("reverted_card_payment?", "reverted_card_payment") == 0


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "{",
        '{"a": 1} and more',
        '```json\n{"a": 1}\n```',
        '{"a": NaN}',
        '{"a": 1, "a": 2}',
        "[" * 100_000,
        "'a'",
    ],
)
def test_json_is_what_a_strict_client_reads(answer):
    """Fences, chatter, NaN, doubled keys and bottomless nesting are no JSON."""
    assert scoring.item_scorer([Scorer(metric="json_valid")])("{}", answer) == {"json_valid": 0.0}


def test_a_schema_is_held_when_there_is_one():
    """Valid JSON of the wrong shape scores 0 under a JSON Schema and 1 without."""
    schema = {
        "type": "object",
        "required": ["priority"],
        "properties": {"priority": {"enum": ["low", "high"]}},
    }
    shaped = scoring.item_scorer([Scorer(metric="json_valid", json_schema=schema)])
    free = scoring.item_scorer([Scorer(metric="json_valid")])
    for answer, want in [('{"priority": "high"}', 1.0), ('{"priority": "huge"}', 0.0), ("[]", 0.0)]:
        assert shaped("", answer)["json_valid"] == want
        assert free("", answer)["json_valid"] == 1.0


def test_a_broken_schema_is_the_configs_fault():
    """The error names the key and what is wrong with it."""
    with pytest.raises(ConfigError, match=r"evaluate.scorers.json_schema.*'objet'"):
        scoring.item_scorer([Scorer(metric="json_valid", json_schema={"type": "objet"})])


def test_fields_are_compared_one_by_one():
    """Each field has a score of its own and the item their mean."""
    answer = json.dumps({"category": "bug", "priority": "low", "product": "app", "entities": ["iOS", "v2"]})
    found = scoring.json_field_match(TICKET, answer, ())
    assert found == {
        "json_field_match": 0.5,
        "json_field_match/category": 1.0,
        "json_field_match/priority": 0.0,
        "json_field_match/product": 1.0,
        "json_field_match/entities": 0.0,
    }
    assert scoring.json_field_match(TICKET, answer, ("category",))["json_field_match"] == 1.0


@pytest.mark.parametrize("answer", ["no json", "[1]", "null", ""])
def test_an_answer_that_is_no_object_matches_no_field(answer):
    """Not even a field that the expected object lacks, too."""
    assert set(scoring.json_field_match(TICKET, answer, ("category", "absent")).values()) == {0.0}


def test_json_values_are_equal_as_json_has_it():
    """1 is 1.0, true is not 1, the order of keys doesn't matter and that of a list does."""
    assert scoring.same_json({"a": [1, {"b": None}], "c": 2}, {"c": 2.0, "a": [1.0, {"b": None}]})
    assert not scoring.same_json([True], [1])
    assert not scoring.same_json([1, 2], [2, 1])
    assert not scoring.same_json({"a": None}, {})


def test_token_f1_is_squads():
    """Worked by hand: 2 shared of 3 and 4 words; articles and punctuation don't count."""
    assert scoring.token_f1("the Denver Broncos, 2016", "Denver Broncos won again") == pytest.approx(2 * 2 / (3 + 4))
    assert scoring.token_f1("The cat.", "a cat") == 1.0
    assert scoring.token_f1("cat", "") == 0.0
    assert scoring.token_f1("yes yes no", "yes no no") == pytest.approx(2 * 2 / 6)


def test_rouge_l_is_the_longest_common_subsequence():
    """Lin's example: 'police killed the gunman' and 'police kill the gunman' share 3 of 4 words in order."""
    found = scoring.item_scorer([Scorer(metric="rougeL")])("police killed the gunman", "police kill the gunman")
    assert found["rougeL"] == pytest.approx(0.75)
    assert scoring.rouge_l("police killed the gunman", "the gunman kill police") == pytest.approx(0.5)


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
    found = scoring.metrics(items, 0.95)
    assert list(found) == ["accuracy", "token_f1", "f1_macro"]
    assert found["accuracy"].value == 0.4
    for interval in found.values():
        assert 0 <= interval.low < interval.value < interval.high <= 1


def test_a_field_is_averaged_over_the_items_that_expect_it():
    """Rows without the field don't pull its mean down."""
    scorers = [Scorer(metric="json_field_match")]
    items = [
        item(1, '{"a": 1, "b": 2}', '{"a": 1, "b": 2}', scorers),
        item(2, '{"a": 1}', '{"a": 2}', scorers),
    ]
    found = scoring.metrics(items, 0.95)
    assert found["json_field_match/b"].value == 1.0
    assert found["json_field_match/a"].value == 0.5


def test_expected_answers_that_no_scorer_can_use_are_all_named():
    """Two of three rows are no JSON objects; both are named, and no other scorer minds."""
    rows = [("01", "{}"), ("02", "bug"), ("03", "[1]")]
    found = scoring.unfit([Scorer(metric="json_field_match")], rows)
    assert [problem.what.split(":")[0] for problem in found] == ["holdout row 02", "holdout row 03"]
    assert scoring.unfit([Scorer(metric="exact_match")], rows) == []
