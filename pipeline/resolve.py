"""A config file as resolved JSON, remembered by the digest of all it was read from.

Reading a config needs pydantic, which takes longer to import than everything else that `tunegate check` does; a file that was
found right once needs no second look until it, or the code that judges it, changes. The standard library is enough then.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import environments, hardware, kubernetes_manifests, store
from pipeline.digests import digest_file, digest_of
from pipeline.errors import ConfigError, Problem
from pipeline.program import write_json

if TYPE_CHECKING:
    from pipeline.config import Config, EvaluateConfig

JUDGES = (
    "config.py", "config_file.py", "config_gate.py", "config_kubernetes.py", "config_section.py", "config_words.py", "environments.py",
    "gate_policy.py", "load_statistics.py", "resolve.py", "scoring.py",
    "scoring_plugins.py", "serving_refusals.py", "slices.py", "statistics.py", "yaml_lines.py",
)  # fmt: skip


def resolve(path: Path, overrides: Sequence[str] = (), data_dir: Path | None = None) -> dict[str, Any]:
    """The resolved config as JSON, every default filled in and every path absolute.

    Raises ConfigError with all mistakes of the file.
    """
    memory = _memory(path, overrides, data_dir) if path.is_file() else None
    if memory and store.holds(memory):
        return dict(json.loads(memory.read_text(encoding="utf-8")))
    from pipeline.config_file import load

    config = load(path, overrides, data_dir, judge).model_dump(mode="json")
    if memory:
        with suppress(OSError):  # a store that can't be written costs time only
            memory.parent.mkdir(parents=True, exist_ok=True)
            write_json(memory, config)
    return config


def judge(config: Config) -> Iterator[Problem]:
    """What would be found wrong hours later: a policy that can never be decided, a scorer or a served unit that can't be made."""
    from pipeline import gate_policy, scoring, scoring_plugins
    from pipeline.serving_refusals import argument_problems, env_problems

    try:
        scoring.item_scorer(config.evaluate.scorers)
    except ConfigError as error:
        yield from error.problems
    yield from scoring_plugins.problems(scorer.metric for scorer in config.evaluate.scorers)
    yield from judges_problems(config.evaluate)
    yield from argument_problems(config.serve.extra_args)
    yield from env_problems(config.serve.env)
    for name, value in config.serve.env.items():
        yield from password_problems(f"serve.env.{name}", value)
    yield from cluster_problems(config)
    if config.merge.merge_base == "dequantized" and not config.finetune.load_in_4bit:
        yield Problem(
            "there is no dequantized base where training is in 16 bits",
            key="merge.merge_base",
            allowed="auto or original",
            remedy="set merge.merge_base: auto, or finetune.adapter: qlora",
        )
    yield from _no_room_for_a_prompt(config)
    yield from gate_policy.problems(config.gate, config.evaluate, config.loadtest, config.data.columns)


def _no_room_for_a_prompt(config: Config) -> Iterator[Problem]:
    """Answers as long as all that a server takes: every request would be refused. Told at the key that was written."""
    most = config.serve.max_model_len
    for name in ("evaluate", "loadtest"):
        section = getattr(config, name)
        if section.max_tokens < most:
            continue
        chosen = "max_tokens" in section.model_fields_set
        yield Problem(
            f"{name}.max_tokens: {section.max_tokens} leaves a prompt no room in serve.max_model_len: {most},"
            " which counts prompt and answer",
            key=f"{name}.max_tokens" if chosen else "serve.max_model_len",
            allowed=f"less than {most}" if chosen else f"more than {section.max_tokens}",
            remedy=f"lower {name}.max_tokens, or raise serve.max_model_len to that and the longest prompt",
        )


def cluster_problems(config: Config) -> Iterator[Problem]:
    """Secrets in a cluster's plain variables: they would stand in manifests, in Prefect's page and in MLflow."""
    if config.kubernetes is None:
        return
    named = environments.secrets_named(config.model_dump(mode="json"))
    for name, value in config.kubernetes.env.items():
        if name in named or environments.SECRET.search(name):
            remedy = f"kubectl create secret generic {config.kubernetes.secret_name} --from-literal={name}=…"
            yield Problem(
                "is a secret", key=f"kubernetes.env.{name}", allowed="variables that anybody may read", remedy=remedy
            )
        else:
            yield from password_problems(f"kubernetes.env.{name}", value)


def password_problems(key: str, value: str) -> Iterator[Problem]:
    """A password inside a variable's value, such as a URL's."""
    if environments.PASSWORD_INSIDE.search(value):
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


def warnings(config: Mapping[str, Any], path: Path) -> list[Problem]:
    """What is allowed and still keeps a build of this resolved config from passing its gate, or from starting here."""
    return [*_undecided(config, path), *_keyless(config, path), *_short_of_gpus(config, path)]


def _short_of_gpus(config: Mapping[str, Any], path: Path) -> Iterator[Problem]:
    """More GPUs wanted than are here, for training or for serving: a build would refuse to start.

    Nothing where a cluster's pod asks for its own.
    """
    from pipeline import finetune_processes, plan

    cluster = config["kubernetes"]
    flow = cluster["flow"] if cluster else None
    checks: tuple[tuple[Mapping[str, Any] | None, Callable[[], None]], ...] = (
        (cluster["jobs"].get("finetune", flow) if cluster else None,
         lambda: finetune_processes.check(config["finetune"]["num_processes"], hardware.device())),
        (flow, lambda: plan.raise_for_too_few_gpus(config)),
    )  # fmt: skip
    for pod, check in checks:
        if pod and kubernetes_manifests.devices(pod):
            continue
        try:
            check()
        except ConfigError as error:
            yield from (replace(problem, file=str(path)) for problem in error.problems)


def _keyless(config: Mapping[str, Any], path: Path) -> Iterator[Problem]:
    """LLM judges whose key isn't in this environment: a build would refuse to start in it."""
    for index, entry in enumerate(config["evaluate"]["judges"]):
        variable = entry["api_key_env"]
        if variable and not os.environ.get(variable):
            yield Problem(
                f"{variable} is not set here, and a build needs it",
                file=str(path),
                key=f"evaluate.judges[{index}].api_key_env",
                remedy=f"export {variable}=… where builds run",
            )


def _undecided(config: Mapping[str, Any], path: Path) -> list[Problem]:
    """No check at all, or none before there is an incumbent: the gate calls it inconclusive."""
    checks = config["gate"]["metrics"]
    if any(check["min"] is not None or check["against"] == "base" for check in checks):
        return []
    why = (
        "every check compares with the incumbent, and before the first promotion there is none"
        if checks
        else "no quality is asked for"
    )
    metric = next((scorer["metric"] for scorer in config["evaluate"]["scorers"]), "exact_match")
    return [
        Problem(
            f"{why}: the verdict can't be pass, and nothing would be registered",
            file=str(path),
            key="gate.metrics",
            allowed="at least one check with min, or against: base",
            remedy=f"add one, such as {{metric: {metric}, min: 0.5}}",
        )
    ]


def _memory(path: Path, overrides: Sequence[str], data_dir: Path | None) -> Path:
    code = {name: digest_file(Path(__file__).with_name(name)) for name in JUDGES}
    root = (data_dir or path.parent).resolve()
    key = digest_of({"file": digest_file(path), "root": str(root), "stem": path.stem, "overrides": list(overrides), "code": code,
                     "there": sorted(entry.name for entry in root.iterdir()) if root.is_dir() else []})  # fmt: skip
    return store.home() / "work" / "configs" / f"{key[:32]}.json"


def sources(config: Mapping[str, Any]) -> dict[str, str]:
    """Digests of what comes from outside: the base model's under "base", the data files' under "prepare", must-pass prompts'.

    Task files of lm-eval stand under "tasks" where the config has tasks.

    Raises ModelError, DataError or ConfigError when one isn't there or, of prompts and tasks, is wrong; EnvironmentMissing where
    the environment that tasks run in isn't made.
    """
    from pipeline import data, model

    train = environments.find("train", environments.settings(config))
    base = model.locate(config["base_model"], config["base_model_revision"], Path.cwd(), train)
    found = {"base": base.digest, "prepare": data.sources_digest(config["data"])}
    if config["evaluate"]["prompts"]:
        from pipeline import prompts_file

        found["prompts"] = prompts_file.sources_digest(config["evaluate"]["prompts"])
    if config["evaluate"]["tasks"]:
        from pipeline import tasks_files

        judges = environments.find("judges", environments.settings(config))
        found["tasks"] = tasks_files.judged(config["evaluate"]["tasks"], judges)
    return found
