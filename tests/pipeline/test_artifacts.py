"""The records that stages hand each other."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError
from support.sample_build import sample_build

from pipeline.artifacts import Artifact, Build, Judgement, ServedUnit
from pipeline.digests import digest_of

UNIT = ServedUnit(
    weights="w", tokenizer="t", configuration="c", runtime="process", runtime_digest="r", vllm_version="1", flags=("--seed=1",),
    env={}, device="cpu-x86_64-avx2",
)  # fmt: skip
OTHER = {"runtime": "docker", "flags": ("--seed=2",), "env": {"OMP_NUM_THREADS": "2"}}


@pytest.mark.parametrize("field", ServedUnit.model_fields)
def test_another_value_in_any_field_is_another_unit(field):
    """So an approval holds for exactly what was judged."""
    assert UNIT.model_copy(update={field: OTHER.get(field, "another")}).digest != UNIT.digest
    assert UNIT.digest == digest_of(UNIT.model_dump(mode="json"))


def test_a_record_is_frozen_and_knows_its_fields():
    """An unknown field is an error, so that an old record is noticed."""
    with pytest.raises(ValidationError, match="frozen"):
        UNIT.weights = "other"
    with pytest.raises(ValidationError, match="extra"):
        ServedUnit(**UNIT.model_dump(), host="127.0.0.1")


def test_an_artefact_knows_its_payload_and_its_extra():
    """Side by side in its folder."""
    artifact = Artifact(stage="merge", key="k", path=Path("/store/k"), digest="d", parents={}, made_by={}, detail={})
    assert (artifact.payload, artifact.extra) == (Path("/store/k/payload"), Path("/store/k/extra"))


@pytest.mark.parametrize(
    ("first", "second", "score"),
    [("candidate", "candidate", 1.0), ("candidate", "other", 0.5), ("tie", "candidate", 0.75), ("other", "other", 0.0)],
)
def test_a_judgement_scores_both_orders(first, second, score):
    """A side that wins in one order alone counts as a tie."""
    assert Judgement(id="1", candidate_first=first, candidate_second=second).score == score


def test_a_build_is_the_same_after_json_and_hands_the_gate_its_reports(tmp_path):
    """As build.json keeps it."""
    build = sample_build(tmp_path)
    assert Build.model_validate_json(build.model_dump_json()) == build
    reports = build.reports
    assert (reports.evaluations, reports.loadtests) == (build.evaluations, build.loadtests)
    assert (reports.tasks, reports.prompts, reports.judged) == (build.tasks, build.prompts, build.judged)
