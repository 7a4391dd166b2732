"""Examples, differences and labels of a report."""

from __future__ import annotations

import re

import pytest
from support.sample_build import full_build, sample_build

from pipeline.artifacts import Build
from pipeline.report import content, facts, plots, render


@pytest.fixture(scope="module")
def build(tmp_path_factory) -> Build:
    return sample_build(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> Build:
    return full_build(tmp_path_factory.mktemp("full"))


def test_flips_come_first(build, full):
    """Twenty items: what the candidate lost, then what it won, each with every system's answer; those against the champion first."""
    examples = content.examples(build, 20)
    assert len(examples) == 20
    kinds = [example.kind for example in examples]
    assert kinds == sorted(kinds, key=["lost", "won", "wrong", "right"].index)
    assert kinds.count("lost") >= 10
    assert kinds.count("won") >= 5
    scores = {answer.role: answer.score for answer in examples[0].answers}
    assert scores["candidate"] < max(scores.values())
    assert set(scores) == {"base", "merged", "candidate"}
    first = {answer.role: answer.score for answer in content.examples(full, 20)[0].answers}
    assert first["candidate"] < first["incumbent"]


def test_few_flips_leave_room_for_the_rest(build):
    """Where nothing flipped all the room goes to what didn't."""
    alone = build.model_copy(update={"evaluations": {"candidate": build.evaluations["candidate"]}})
    kinds = [example.kind for example in content.examples(alone, 20)]
    assert len(kinds) == 20
    assert set(kinds) == {"wrong", "right"}


def test_each_step_has_a_paired_difference(build):
    """Fine-tuning and AWQ are told apart: what each did to the headline metric, paired."""
    training, awq = content.deltas(build)
    assert (training.step, awq.step) == ("fine-tuning: merged - base", "AWQ: candidate - merged")
    assert training.metric == "json_field_match"
    assert training.change.low > 0.5
    means = {role: system.metrics["json_field_match"].value for role, system in build.evaluations.items()}
    assert awq.change.value == pytest.approx(means["candidate"] - means["merged"])


def test_a_system_scored_on_other_items_is_not_compared_item_by_item(build):
    """An incumbent with fewer items is in the tables, not in the examples or differences."""
    short = build.evaluations["merged"].model_copy(
        update={"system": "incumbent", "items": build.evaluations["merged"].items[:50]}
    )
    more = build.model_copy(update={"evaluations": {**build.evaluations, "incumbent": short}})
    assert render.scores_table(more)[0][-1] == "incumbent (champion)"
    assert len(content.deltas(more)) == 2
    assert {answer.role for answer in content.examples(more, 1)[0].answers} == {
        "base",
        "merged",
        "candidate",
    }


def test_a_system_message_that_all_prompts_share_is_said_once(build):
    """Examples show the user's own words; where prompts begin differently they are examples whole."""
    head = "system: Triage the ticket.\nuser: "
    candidate = build.evaluations["candidate"]
    items = tuple(item.model_copy(update={"prompt": head + item.prompt}) for item in candidate.items)
    prefixed = build.model_copy(
        update={"evaluations": {**build.evaluations, "candidate": candidate.model_copy(update={"items": items})}}
    )
    assert content.shared_prompt(prefixed) == head
    assert content.examples(prefixed, 1)[0].prompt == content.examples(build, 1)[0].prompt
    assert render.html(prefixed).count("Triage the ticket.") == 1
    assert content.shared_prompt(build) == ""


def relabelled(build: Build, detail: dict[str, object], **config: object) -> Build:
    """The build with other words in the quantizer's detail, and another section quantize."""
    artifact = build.artifacts["quantize"].model_copy(update={"detail": detail})
    section = {**build.config["quantize"], **config}
    return build.model_copy(
        update={
            "artifacts": {**build.artifacts, "quantize": artifact},
            "config": {**build.config, "quantize": section},
        }
    )


def test_nothing_says_awq_unless_it_was(full):
    """A made-up method's report in HTML, Markdown, JSON, its card, its tables and its pictures name that method alone."""
    detail = {**full.artifacts["quantize"].detail, "method": "zip", "backend": "zipper", "label": "ZIP, zipper"}
    build = relabelled(full, detail, method="zip", backend="zipper")
    texts = [render.html(build), render.markdown(build), render.to_json(build), render.model_card(build)]
    texts += [str(render.scores_table(build)), *(svg.decode() for svg in plots.svgs(build).values())]
    for text in texts:
        assert "awq" not in re.sub(r"base64,[A-Za-z0-9+/=]+", "", text).lower()
    assert all("ZIP" in text for text in texts[:3])
    assert ("quantized by", "ZIP, zipper") in facts.training_facts(build)


@pytest.mark.parametrize(
    ("section", "label"),
    [
        ({"method": "llmcompressor"}, "AWQ, llm-compressor"),
        ({"method": "autoawq"}, "AWQ, AutoAWQ"),
        ({"method": "awq", "backend": "autoawq"}, "AWQ, AutoAWQ"),
    ],
)
def test_a_build_without_a_label_is_named_by_its_config(build, section, label):
    """Version 0.1 recorded none; a build that wasn't quantized has no label at all."""
    old = relabelled(build, {"method": "x", "group_size": 64}, **{"backend": None, **section})
    assert content.method_label(old) == label
    assert content.system_label(old, "candidate") == "candidate (AWQ, groups of 64)"
    assert content.method_label(build.model_copy(update={"artifacts": {}})) is None


def test_a_method_without_groups_is_named_alone(build):
    """Not every method has a group size."""
    assert content.system_label(relabelled(build, {"label": "FP8, tool"}), "candidate") == "candidate (FP8)"
