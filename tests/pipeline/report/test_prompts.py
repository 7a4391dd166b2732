"""Which must-pass prompts broke since the champion."""

from __future__ import annotations

import pytest
from support.sample_build import must_pass, sample_build

from pipeline.artifacts import Build
from pipeline.report import prompts


@pytest.fixture(scope="module")
def build(tmp_path_factory) -> Build:
    return sample_build(tmp_path_factory.mktemp("store"), count=100).model_copy(update={"prompts": must_pass()})


def test_those_that_the_champion_held_stand_apart(build):
    """Lost, broken in both with the champion's answer beside it, and mended."""
    found = prompts.prompts(build)
    assert [one.id for one in found.lost] == ["refund period"]
    assert (found.lost[0].answer, found.lost[0].champion) == ("You have 30 days.", "You have 14 days.")
    assert [one.id for one in found.broken] == ["another's address"]
    assert found.mended == ("triage as JSON",)
    assert found.said == "2 of 4 must-pass prompts hold; broken since the champion: 1, broken before: 1, mended: 1."


def test_without_a_champion_nothing_broke_since(build):
    """Broken is broken, and the sentence says that there is nothing to compare with."""
    found = prompts.prompts(build.model_copy(update={"prompts": {"candidate": build.prompts["candidate"]}}))
    assert (found.lost, found.mended) == ((), ())
    assert [one.id for one in found.broken] == ["refund period", "another's address"]
    assert "no champion" in found.said
    assert prompts.prompts(build.model_copy(update={"prompts": {}})) is None
