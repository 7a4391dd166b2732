"""pipeline.report.facts: a report's names and values."""

from __future__ import annotations

import pytest
from support.sample_build import full_build, sample_build

from pipeline.artifacts import Build
from pipeline.finetune import objectives
from pipeline.report import facts


@pytest.fixture(scope="module")
def build(tmp_path_factory) -> Build:
    return sample_build(tmp_path_factory.mktemp("store"))


def with_detail(build: Build, stage: str, **changes: object) -> Build:
    """The build with other words in one stage's detail."""
    artifact = build.artifacts[stage]
    detail = {**artifact.detail, **changes}
    return build.model_copy(
        update={"artifacts": {**build.artifacts, stage: artifact.model_copy(update={"detail": detail})}}
    )


def with_config(build: Build, section: str, **changes: object) -> Build:
    """The build with other settings in one section of its config."""
    return build.model_copy(update={"config": {**build.config, section: {**build.config.get(section, {}), **changes}}})


@pytest.mark.parametrize(
    ("fact", "text"),
    [
        (True, "yes"),
        (False, "no"),
        (0, "0"),
        (1234567, "1,234,567"),
        (0.0, "0"),
        (0.00012345, "0.0001234"),
        (2e-5, "2e-05"),
        ({"train": 1200, "val": {"kept": True}}, "train 1,200, val kept yes"),
        (["a", 0.5, 2000], "a, 0.5, 2,000"),
        (("a", ("b", False)), "a, b, no"),
        ("as it is", "as it is"),
    ],
)
def test_a_fact_is_text_that_a_person_reads(fact, text):
    """Yes and no, thousands apart, four digits of a fraction, lists and tables in one line; zero and no are facts too."""
    assert facts.facts([("name", fact)]) == [("name", text)]


@pytest.mark.parametrize("absent", [None, "", [], {}, ()])
def test_what_is_absent_is_no_fact(absent):
    """A name without a value is left out, and the others keep their order."""
    assert facts.facts([("b", 1), ("gone", absent), ("a", 2)]) == [("b", "1"), ("a", "2")]


def test_a_model_without_a_licence_says_so(build):
    """Where the base states none, or there is no base artefact at all, its makers are to be large_batch."""
    assert ("licence", "apache-2.0") in facts.model_facts(build)
    for unknown in (with_detail(build, "base", licence=None), build.model_copy(update={"artifacts": {}})):
        pairs = dict(facts.model_facts(unknown))
        assert pairs["licence"] == "not stated: ask its makers before you serve it"
        assert pairs["base model"] == build.config["base_model"]


def test_the_models_origin_is_told(build):
    """Source, revision, precision of the file it came from, and size."""
    pairs = dict(facts.model_facts(build))
    assert (pairs["source"], pairs["revision"]) == ("SmolLM2-135M-Instruct.Q4_1.gguf", "0.1.2")
    assert (pairs["dequantized from"], pairs["parameters"]) == ("Q4_1 GGUF", "134,515,008")


def test_files_are_told_without_their_folders(build):
    """A reviewer sees which files, and no path of the machine that built."""
    sources = [{"path": "/home/someone/tickets-train.jsonl"}, {"path": "more.jsonl"}]
    pairs = facts.data_facts(with_config(build, "data", datasets=sources))
    assert ("files", "tickets-train.jsonl, more.jsonl") in pairs
    assert not any("/home" in text for _, text in pairs)


def test_tokens_are_totals_however_they_were_recorded(build):
    """A set's tokens stand as a number or as a table with a total."""
    pairs = dict(
        facts.data_facts(with_detail(build, "prepare", tokens={"train": {"total": 5000, "max": 9}, "val": 70}))
    )
    assert pairs["tokens"] == "train 5,000, val 70"


def test_leaks_that_were_looked_for_are_told_even_if_there_are_none(build):
    """Zero near, inside and overlapping are findings; without benchmarks to compare with there is no such line."""
    clean = {"near_duplicates": {"holdout_near_train": 0}, "inside": {"holdout_inside_train": 0}}
    pairs = dict(facts.data_facts(with_detail(build, "prepare", **clean)))
    assert pairs["holdout rows near a training row"] == pairs["holdout rows inside a training row"] == "0"
    assert pairs["benchmark documents in training"] == "0 of 14,042"
    without = facts.data_facts(with_detail(build, "prepare", benchmarks={"documents": 0, "overlapping": 0}))
    assert "benchmark documents in training" not in dict(without)


def test_a_build_without_artefacts_has_only_its_configs_facts(build):
    """Nothing measured, nothing told, and no error."""
    bare = build.model_copy(update={"artifacts": {}})
    assert facts.data_facts(bare) == [("files", "tickets-train.jsonl")]
    names = [name for name, _ in facts.training_facts(bare)]
    assert "learning_rate" in names
    assert not {"steps", "train_loss", "merged into", "quantized by", "calibration samples"} & set(names)


def test_the_effective_batch_is_rows_a_step(build):
    """Rows a pass times passes a step."""
    large_batch = with_config(build, "finetune", micro_batch_size=3, gradient_accumulation_steps=8)
    assert dict(facts.training_facts(large_batch))["effective batch"] == "24"


def test_the_losses_are_those_of_the_objective(build, monkeypatch):
    """Each objective names the two metrics that it reports; those of another aren't shown."""
    assert {("train_loss", "0.0412"), ("eval_loss", "0.0533")} <= set(facts.training_facts(build))
    reward = objectives.Objective("rows", "loss", "reward", train_metric="reward", eval_metric="eval_reward")
    monkeypatch.setitem(objectives.OBJECTIVES, "praise", reward)
    praise_build = with_detail(
        with_config(build, "finetune", objective="praise"), "finetune", reward=0.25, eval_reward=0.5
    )
    pairs = dict(facts.training_facts(praise_build))
    assert (pairs["reward"], pairs["eval_reward"]) == ("0.25", "0.5")
    assert "train_loss" not in pairs


@pytest.mark.parametrize(
    ("detail", "text"),
    [
        (
            {"merge_base": "original", "val_loss/original": 0.05, "val_loss/dequantized": 0.07},
            "the original base (validation loss: original 0.05, dequantized 0.07)",
        ),
        ({"merge_base": "dequantized", "max_abs_delta": 0.01}, "the dequantized base"),
        ({"max_abs_delta": 0.01}, None),
    ],
)
def test_the_merge_says_which_base_and_why(build, detail, text):
    """Both losses where both were measured; only the base where the config chose it."""
    artifact = build.artifacts["merge"].model_copy(update={"detail": detail})
    remerge = build.model_copy(update={"artifacts": {**build.artifacts, "merge": artifact}})
    assert dict(facts.training_facts(remerge)).get("merged into") == text


def test_quantizing_is_told_with_both_perplexities(build):
    """Tool, samples, and the answers' perplexity before and after."""
    pairs = dict(facts.training_facts(build))
    assert pairs["quantized by"] == "AWQ, llm-compressor"
    assert pairs["calibration samples"] == "16"
    assert (pairs["perplexity before quantization"], pairs["perplexity after quantization"]) == ("3.1", "3.3")


def test_the_served_unit_is_told_part_by_part(build):
    """The digest to approve comes first, then every field of the unit: a part that isn't shown can't be reviewed."""
    pairs = facts.serving_facts(build)
    assert pairs[0] == ("served unit", build.unit.digest)
    text = "\n".join(text for _, text in pairs)
    for field, part in build.unit.model_dump().items():
        words = part if isinstance(part, tuple) else [*part, *part.values()] if isinstance(part, dict) else [part]
        assert all(str(word) in text for word in words), field
    assert ("flags", "--enforce-eager --max-model-len=512 --max-num-seqs=32") in pairs


def test_every_artefact_has_its_digest(build):
    """Key, artefacts, prepared sets, and the one holdout that all were scored on; two where systems saw different ones."""
    pairs = facts.digests(build)
    assert pairs[0] == ("build", build.key)
    assert {(f"{stage} artefact", artifact.digest) for stage, artifact in build.artifacts.items()} <= set(pairs)
    assert ("train", "7e" * 32) in pairs
    assert pairs[-1] == ("scored on", "4f" * 32)
    base = build.evaluations["base"].model_copy(update={"holdout_digest": "0a" * 32})
    two_holdouts = build.model_copy(update={"evaluations": {**build.evaluations, "base": base}})
    assert facts.digests(two_holdouts)[-1] == ("scored on", f"{'0a' * 32}, {'4f' * 32}")


def test_only_a_pass_may_be_approved(build, tmp_path):
    """Review, approve, promote and roll back by the build's name; after a failure, a doubt or no verdict, build again."""
    commands = [command.split()[:3] for command, _ in facts.next_steps(build)]
    assert commands == [["tunegate", verb, "tickets"] for verb in ("review", "approve", "promote", "rollback")]
    doubt = build.model_copy(update={"verdict": build.verdict.model_copy(update={"outcome": "inconclusive"})})
    for record in (full_build(tmp_path), doubt, build.model_copy(update={"verdict": None})):
        assert [command for command, _ in facts.next_steps(record)] == ["tunegate run CONFIG"]
