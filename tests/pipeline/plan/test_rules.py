"""Rules between a config's sections: each mistake has its key and a remedy, and the remedy ends it."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.config.schema import Config, EvaluateConfig
from pipeline.errors import Problem
from pipeline.plan import rules

IMAGE = f"tunegate@sha256:{'0' * 64}"
JUDGE = {"base_url": "https://host/v1", "model": "m"}


def config(sections: dict[str, Any]) -> Config:
    """A config with these sections beside its data."""
    return Config(name="m", data={"datasets": [{"path": "a.jsonl"}]}, **sections)


def problems(sections: dict[str, Any]) -> list[Problem]:
    """What is wrong between the sections of such a config."""
    return list(rules.problems_across_sections(config(sections)))


def cluster(**env: str) -> dict[str, Any]:
    """A cluster whose pods get these plain variables."""
    return {"kubernetes": {"image": IMAGE, "env": env}}


# sections with one mistake, its key, words of the problem, words of the remedy, the sections after that remedy
MISTAKES = {
    "a schema that is none": (
        {"evaluate": {"scorers": [{"metric": "json_valid", "json_schema": {"type": 3}}]}},
        "evaluate.scorers.json_schema",
        "json_schema is not a JSON Schema",
        "correct the schema",
        {"evaluate": {"scorers": [{"metric": "json_valid", "json_schema": {"type": "object"}}]}},
    ),
    "no scorer": (
        {"evaluate": {"scorers": [{"metric": "exact_match"}, {"metric": "token_f2"}]}},
        "evaluate.scorers[1].metric",
        "token_f2 is not a scorer",
        "correct it, or install the package",
        {"evaluate": {"scorers": [{"metric": "exact_match"}, {"metric": "token_f1"}]}},
    ),
    "a judge of what is not measured": (
        {"evaluate": {"judges": [{**JUDGE, "against": "base"}], "compare": ["merged"]}},
        "evaluate.judges[0].against",
        "base is not measured",
        "add base to evaluate.compare, or judge against: incumbent",
        {"evaluate": {"judges": [{**JUDGE, "against": "incumbent"}], "compare": ["merged"]}},
    ),
    "a flag with a key of its own": (
        {"serve": {"extra_args": {"dtype": "float16"}}},
        "serve.extra_args.dtype",
        "must be set by its own key",
        "set serve.dtype",
        {"serve": {"dtype": "float16"}},
    ),
    "a variable that the server may not have": (
        {"serve": {"env": {"LD_PRELOAD": "x.so"}}},
        "serve.env.LD_PRELOAD",
        "is not an allowed environment variable",
        "remove it",
        {"serve": {"env": {}}},
    ),
    "a password in the server's variable": (
        {"serve": {"env": {"VLLM_PROXY": "http://user:hunter2@host"}}},
        "serve.env.VLLM_PROXY",
        "holds a password",
        "take it out",
        {"serve": {"env": {"VLLM_PROXY": "http://host"}}},
    ),
    "a secret in a cluster's variables": (
        cluster(HF_TOKEN="hf_x"),
        "kubernetes.env.HF_TOKEN",
        "is a secret",
        "kubectl create secret generic tunegate --from-literal=HF_TOKEN=…",
        cluster(),
    ),
    "a password in a cluster's variable": (
        cluster(MLFLOW_TRACKING_URI="http://user:hunter2@mlflow:5000"),
        "kubernetes.env.MLFLOW_TRACKING_URI",
        "holds a password",
        "MLFLOW_TRACKING_USERNAME",
        cluster(MLFLOW_TRACKING_URI="http://mlflow:5000"),
    ),
    "a dequantized base without four bits": (
        {"merge": {"merge_base": "dequantized"}, "finetune": {"adapter": "lora", "load_in_4bit": False}},
        "merge.merge_base",
        "needs 4-bit training",
        "set merge.merge_base: auto, or finetune.adapter: qlora",
        {"merge": {"merge_base": "dequantized"}, "finetune": {"adapter": "qlora"}},
    ),
    "answers without a prompt": (
        {"evaluate": {"max_tokens": 2048}},
        "evaluate.max_tokens",
        "evaluate.max_tokens: 2048 leaves a prompt no room in serve.max_model_len: 2048",
        "lower evaluate.max_tokens, or raise serve.max_model_len",
        {"evaluate": {"max_tokens": 2047}},
    ),
    "load without a prompt": (
        {"loadtest": {"max_tokens": 4096}},
        "loadtest.max_tokens",
        "loadtest.max_tokens: 4096 leaves a prompt no room",
        "lower loadtest.max_tokens, or raise serve.max_model_len",
        {"loadtest": {"max_tokens": 4096}, "serve": {"max_model_len": 4097}},
    ),
    "a policy that cannot be decided": (
        {"gate": {"metrics": [{"metric": "token_f1", "min": 0.5}]}},
        "gate.metrics[0].metric",
        "token_f1 is not measured",
        "add it to evaluate.scorers, or drop the check",
        {"gate": {"metrics": [{"metric": "token_f1", "min": 0.5}]}, "evaluate": {"scorers": [{"metric": "token_f1"}]}},
    ),
    "a policy of a column that rows lose": (
        {"gate": {"cluster_by": "customer"}},
        "gate.cluster_by",
        "customer isn't among the columns",
        "add customer to data.columns",
        {},
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_has_its_key_and_the_remedy_ends_it(mistake):
    """One problem, with words for both; the config that follows the remedy has none, and no password is repeated."""
    sections, key, words, remedy, cure = mistake
    (problem,) = problems(sections)
    assert problem.key == key
    assert words in problem.what
    assert remedy in str(problem.remedy)
    assert "hunter2" not in str(problem)
    assert problems(cure) == []


def test_a_config_of_defaults_has_no_problem():
    """With a cluster as well."""
    assert problems({}) == []
    assert problems(cluster()) == []


def test_all_mistakes_come_at_once_in_one_order():
    """Scorers, judges, server, cluster, merge, room, policy."""
    sections: dict[str, Any] = {
        "gate": {"cluster_by": "customer"},
        "loadtest": {"max_tokens": 2048},
        "merge": {"merge_base": "dequantized"},
        "finetune": {"adapter": "lora", "load_in_4bit": False},
        **cluster(HF_TOKEN="x"),
        "serve": {"env": {"LD_PRELOAD": "x"}, "extra_args": {"port": 1}},
        "evaluate": {"judges": [JUDGE], "compare": [], "scorers": [{"metric": "token_f2"}]},
    }
    assert [problem.key for problem in problems(sections)] == [
        "evaluate.scorers[0].metric",
        "evaluate.judges[0].against",
        "serve.extra_args.port",
        "serve.env.LD_PRELOAD",
        "kubernetes.env.HF_TOKEN",
        "merge.merge_base",
        "loadtest.max_tokens",
        "gate.cluster_by",
    ]


def test_no_room_is_told_where_somebody_wrote():
    """A server that takes less than the default answer is to take more; each section that asks for too much is told."""
    evaluate, loadtest = problems({"serve": {"max_model_len": 64}})
    assert {evaluate.key, loadtest.key} == {"serve.max_model_len"}
    assert (evaluate.allowed, loadtest.allowed) == ("more than 256", "more than 64")
    (problem,) = problems(
        {"serve": {"max_model_len": 64}, "evaluate": {"max_tokens": 64}, "loadtest": {"max_tokens": 63}}
    )
    assert (problem.key, problem.allowed) == ("evaluate.max_tokens", "less than 64")


@pytest.mark.parametrize("base", ["auto", "original"])
def test_every_other_base_goes_with_16_bit_training(base):
    """Only the dequantized one is made from four bits."""
    lora = {"adapter": "lora", "load_in_4bit": False}
    assert problems({"merge": {"merge_base": base}, "finetune": lora}) == []


@pytest.mark.parametrize(
    ("sections", "variable"),
    [
        ({"evaluate": {"judges": [{**JUDGE, "api_key_env": "JUDGE"}]}}, "JUDGE"),
        ({"promote": {"api_key_env": "DOOR"}}, "DOOR"),
        ({"notify": {"webhook_env": "HOOK"}}, "HOOK"),
        ({}, "my_password"),
        ({}, "AWS_SECRET_ACCESS_KEY"),
    ],
)
def test_a_clusters_secret_is_told_by_its_name(sections, variable):
    """Another section names it as one, or it is called like one; once, although its value looks like a password too."""
    env = cluster(**{variable: "http://user:hunter2@host"})
    (problem,) = rules.cluster_problems(config({**sections, **env}))
    assert (problem.what, problem.key) == ("is a secret", f"kubernetes.env.{variable}")
    assert "hunter2" not in str(problem)


def test_a_name_that_no_section_calls_a_secret_is_plain():
    """The same variables without a judge, a door or a hook that read them."""
    assert list(rules.cluster_problems(config(cluster(JUDGE="a", DOOR="b", HOOK="c", TOKENIZERS="d")))) == []


def test_the_remedy_names_the_clusters_own_secret():
    """As the config calls it."""
    env = cluster(HF_TOKEN="x")
    env["kubernetes"]["secret_name"] = "team-keys"
    (problem,) = rules.cluster_problems(config(env))
    assert "secret generic team-keys " in str(problem.remedy)


def test_without_a_cluster_no_variable_is_looked_at():
    """There is none that it could give away."""
    assert list(rules.cluster_problems(config({"notify": {"webhook_env": "HOOK"}}))) == []


@pytest.mark.parametrize("text", ["http://mlflow:5000", "https://user@host/a:b", "a=b", "password=", ""])
def test_a_value_without_a_password_is_no_problem(text):
    """A port, a user's name, an empty setting."""
    assert list(rules.password_problems("serve.env.A", text)) == []


@pytest.mark.parametrize("text", ["x://:hunter2@host", "http://u:hunter2@h", "a=1 Password = hunter2", "pwd=hunter2"])
def test_a_value_with_a_password_is_told_under_the_key_that_is_given(text):
    """In a URL or as a setting; without its words."""
    (problem,) = rules.password_problems("serve.env.A", text)
    assert problem.key == "serve.env.A"
    assert problem.allowed == "values that anybody may read"
    assert "hunter2" not in str(problem)


def test_each_judge_is_told_by_its_place():
    """The incumbent's needs nothing, and the base's only that the base is compared."""
    judges = [{**JUDGE, "against": "incumbent"}, {**JUDGE, "against": "base"}]
    (problem,) = rules.judges_problems(EvaluateConfig(judges=judges, compare=["merged"]))
    assert problem.key == "evaluate.judges[1].against"
    assert list(rules.judges_problems(EvaluateConfig(judges=judges, compare=["base"]))) == []
