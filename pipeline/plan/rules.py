"""Rules of a config that hold between its sections: a policy that can be decided, scorers and a unit that can be made."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pipeline.environments import interpreters
from pipeline.errors import ConfigError, Problem

if TYPE_CHECKING:
    from pipeline.config.schema import Config, EvaluateConfig


def problems_across_sections(config: Config) -> Iterator[Problem]:
    """Mistakes that would show hours later: a policy that can never be decided, a scorer or a served unit that can't be made."""
    from pipeline.evaluation import plugins, scoring
    from pipeline.gate import policy
    from pipeline.serving.refusals import argument_problems, env_problems

    try:
        scoring.item_scorer(config.evaluate.scorers)
    except ConfigError as error:
        yield from error.problems
    yield from plugins.problems(scorer.metric for scorer in config.evaluate.scorers)
    yield from judges_problems(config.evaluate)
    yield from argument_problems(config.serve.extra_args)
    yield from env_problems(config.serve.env)
    for name, value in config.serve.env.items():
        yield from password_problems(f"serve.env.{name}", value)
    yield from cluster_problems(config)
    if config.merge.merge_base == "dequantized" and not config.finetune.load_in_4bit:
        yield Problem(
            "a dequantized base needs 4-bit training",
            key="merge.merge_base",
            allowed="auto or original",
            remedy="set merge.merge_base: auto, or finetune.adapter: qlora",
        )
    yield from _no_room_for_a_prompt(config)
    yield from policy.problems(config.gate, config.evaluate, config.loadtest, config.data.columns)


def _no_room_for_a_prompt(config: Config) -> Iterator[Problem]:
    """Answers as long as all that a server takes: every request would be refused. Told at the key that was written."""
    most = config.serve.max_model_len
    for name in ("evaluate", "loadtest"):
        section = getattr(config, name)
        if section.max_tokens < most:
            continue
        is_written = "max_tokens" in section.model_fields_set
        yield Problem(
            f"{name}.max_tokens: {section.max_tokens} leaves a prompt no room in serve.max_model_len: {most},"
            " which counts prompt and answer",
            key=f"{name}.max_tokens" if is_written else "serve.max_model_len",
            allowed=f"less than {most}" if is_written else f"more than {section.max_tokens}",
            remedy=f"lower {name}.max_tokens, or raise serve.max_model_len to that and the longest prompt",
        )


def cluster_problems(config: Config) -> Iterator[Problem]:
    """Secrets in a cluster's plain variables: they would stand in manifests, in Prefect's page and in MLflow."""
    if config.kubernetes is None:
        return
    secrets = interpreters.secrets_named(config.model_dump(mode="json"))
    for name, value in config.kubernetes.env.items():
        if name in secrets or interpreters.SECRET.search(name):
            remedy = f"kubectl create secret generic {config.kubernetes.secret_name} --from-literal={name}=…"
            yield Problem(
                "is a secret", key=f"kubernetes.env.{name}", allowed="variables that anybody may read", remedy=remedy
            )
        else:
            yield from password_problems(f"kubernetes.env.{name}", value)


def password_problems(key: str, value: str) -> Iterator[Problem]:
    """A password inside a variable's value, such as a URL's."""
    if interpreters.PASSWORD_INSIDE.search(value):
        yield Problem(
            "holds a password",
            key=key,
            allowed="values that anybody may read",
            remedy="take it out: MLflow has MLFLOW_TRACKING_USERNAME and, among the secrets, MLFLOW_TRACKING_PASSWORD",
        )


def judges_problems(evaluate: EvaluateConfig) -> Iterator[Problem]:
    """LLM judges that are to compare with what isn't measured."""
    for index, entry in enumerate(evaluate.judges):
        if entry.against == "base" and "base" not in evaluate.compare:
            yield Problem(
                "base is not measured",
                key=f"evaluate.judges[{index}].against",
                allowed="incumbent, or base where evaluate.compare has it",
                remedy="add base to evaluate.compare, or judge against: incumbent",
            )
