"""The table of scorers, and each scorer in it."""

from __future__ import annotations

import json

import pytest
from support.sample_build import full_build

from pipeline.artifacts import Item
from pipeline.config.gate import GateConfig, MetricCheck
from pipeline.config.schema import EvaluateConfig, LoadtestConfig, Scorer
from pipeline.errors import ConfigError
from pipeline.evaluation import plugins, scorers, scoring
from pipeline.evaluation.scorers import SCORERS
from pipeline.gate import policy as gate_policy
from pipeline.report import content

TICKET = json.dumps({"category": "bug", "priority": "high", "product": "app", "entities": ["v2", "iOS"]})


def test_the_configs_words_are_the_tables_keys():
    """The allowed values that `tunegate check` and the docs show are read from this description."""
    described = Scorer.model_fields["metric"].description.partition(", or the name of")[0]
    assert described.split(", ") == list(SCORERS)
    examples = MetricCheck.model_fields["metric"].description.partition(": ")[2].partition(", …")[0].split(", ")
    assert set(examples) <= set(scoring.names_measured([Scorer(metric=name) for name in SCORERS]))


@pytest.mark.parametrize("name", SCORERS)
def test_every_scorer_measures_what_the_gate_may_ask_of_it(name, tmp_path):
    """Its metrics are those of scored items, the policy takes each and no other, and no package is asked for it."""
    entry, reference = Scorer(metric=name), '{"a": 1}'
    scores = scoring.item_scorer([entry])(reference, reference)
    items = [Item(id="1", prompt="?", expected=reference, answer=reference, finish_reason="stop", scores=scores)]
    assert set(scores.values()) == {1.0}
    parts = {metric for metric in scores if "/" in metric}
    assert bool(parts) == SCORERS[name].has_parts
    assert set(scoring.metric_names(items)) - parts == set(scoring.names_measured([entry]))
    assert list(scoring.metrics(items, 0.95)) == scoring.metric_names(items)
    for metric in scoring.metric_names(items):
        checks = GateConfig(metrics=(MetricCheck(metric=metric, min=0.5),))
        assert gate_policy.problems(checks, EvaluateConfig(scorers=(entry,)), LoadtestConfig()) == []
        assert scorers.scored_by(metric) in scores
    absent = GateConfig(metrics=(MetricCheck(metric=f"{name}x", min=0.5),))
    assert len(gate_policy.problems(absent, EvaluateConfig(scorers=(entry,)), LoadtestConfig())) == 1
    assert plugins.versions([name]) == {}


def test_the_report_speaks_of_the_tables_metrics(tmp_path):
    """Every metric of a build's report is one that its scorers bring, and single items are shown by a score they have."""
    build = full_build(tmp_path)
    entries = [Scorer(**entry) for entry in build.config["evaluate"]["scorers"]]
    assert all(scoring.is_measured(metric, entries) for metric in content.metric_names(build))
    assert content.item_metric(build) in build.evaluations["candidate"].items[0].scores


@pytest.mark.parametrize(
    ("answer", "score"),
    [("Paris", 1), (" Paris\n", 1), ("paris", 0), ("Paris.", 0), ("Paris, France", 0), ("", 0)],
)
def test_exact_match_forgives_only_white_space_around(answer, score):
    """Every other character counts."""
    assert scorers.exact_match("Paris", answer) == score


@pytest.mark.parametrize(
    ("answer", "score"),
    [("Card_Arrival", 1), ('"card_arrival".', 1), ("card arrival", 0), ("the card_arrival", 0)],
)
def test_a_label_forgives_case_and_wrapping(answer, score):
    """Quotes, full stops and case don't change a label; another word does."""
    assert scorers.accuracy("card_arrival", answer) == score


def test_labels_that_differ_in_signs_stay_apart():
    """Folding must not make C of C++ or drop a question mark that belongs to the label."""
    assert scorers.accuracy("C++", "C") == 0
    assert scorers.accuracy("reverted_card_payment?", "reverted_card_payment") == 0


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
    scores = scorers.json_field_match(TICKET, answer, ())
    assert scores == {
        "json_field_match": 0.5,
        "json_field_match/category": 1.0,
        "json_field_match/priority": 0.0,
        "json_field_match/product": 1.0,
        "json_field_match/entities": 0.0,
    }
    assert scorers.json_field_match(TICKET, answer, ("category",))["json_field_match"] == 1.0


@pytest.mark.parametrize("answer", ["no json", "[1]", "null", ""])
def test_an_answer_that_is_no_object_matches_no_field(answer):
    """Not even a field that the expected object lacks, too."""
    assert set(scorers.json_field_match(TICKET, answer, ("category", "absent")).values()) == {0.0}


def test_json_values_are_equal_as_json_has_it():
    """1 is 1.0, true is not 1, the order of keys doesn't matter and that of a list does."""
    assert scorers.same_json({"a": [1, {"b": None}], "c": 2}, {"c": 2.0, "a": [1.0, {"b": None}]})
    assert not scorers.same_json([True], [1])
    assert not scorers.same_json([1, 2], [2, 1])
    assert not scorers.same_json({"a": None}, {})


def test_token_f1_is_squads():
    """Worked by hand: 2 shared of 3 and 4 words; articles and punctuation don't count."""
    assert scorers.token_f1("the Denver Broncos, 2016", "Denver Broncos won again") == pytest.approx(2 * 2 / (3 + 4))
    assert scorers.token_f1("The cat.", "a cat") == 1.0
    assert scorers.token_f1("cat", "") == 0.0
    assert scorers.token_f1("yes yes no", "yes no no") == pytest.approx(2 * 2 / 6)


def test_rouge_l_is_the_longest_common_subsequence():
    """Lin's example: 'police killed the gunman' and 'police kill the gunman' share 3 of 4 words in order."""
    scores = scoring.item_scorer([Scorer(metric="rougeL")])("police killed the gunman", "police kill the gunman")
    assert scores["rougeL"] == pytest.approx(0.75)
    assert scorers.rouge_l("police killed the gunman", "the gunman kill police") == pytest.approx(0.5)
