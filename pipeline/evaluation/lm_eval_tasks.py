"""Stage program: one task of lm-eval against a served model, over its OpenAI-compatible endpoints.

Runs in the environment judges, which holds lm-eval without torch. Request: config `task` (an entry of evaluate.tasks), `url`,
`model`, `model_path` (whose tokenizer counts tokens), `max_model_len`, `seed`, `concurrency`. Payload: what lm-eval writes of
itself (NAME/results_*.json, NAME/samples_*.jsonl; flags, seeds and concurrency are in there) and records.json, a TaskResult for
each metric.

Tasks that generate go to /v1/chat/completions, where the server applies its template; all others to /v1/completions, as token
ids of the plain text, which is lm-eval's way to get the log-likelihood of a choice. Answers are greedy whatever the task says.
Nothing but lm-eval's own code runs: templates are rendered in Jinja's sandbox, metrics of the hub are refused. A killed run
starts its task anew.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from numbers import Real
from pathlib import Path
from typing import Any

from pipeline import files, program
from pipeline.artifacts import TaskResult
from pipeline.config.schema import TaskConfig
from pipeline.errors import ConfigError, StageFailed
from pipeline.evaluation import lm_eval_files

TIMEOUT_S = 600
ATTEMPTS = 3


def run(request: program.Request) -> dict[str, Any]:
    """Run the task; see the module docstring.

    Raises ConfigError when lm-eval can't load it, it needs code from elsewhere, or a metric isn't there.
    """
    entry = TaskConfig(**request.config["task"])
    start = time.monotonic()
    _prepare(entry, request.folder)
    manager, catalogue = _load(entry)
    api, arguments = _endpoint(request, catalogue["tasks"])
    program.message(f"lm-eval {version('lm_eval')}: {', '.join(catalogue['tasks'])} by {api}")
    shutil.rmtree(request.payload)  # what a killed run left
    results, samples = _evaluate(entry, manager, catalogue, api, arguments, request)
    task_results = records(results, samples, entry.metrics)
    files.write_json(request.payload / "records.json", [record.model_dump(mode="json") for record in task_results])
    return {
        "endpoint": api,
        "documents": sum(len(record.ids) for record in {record.task: record for record in task_results}.values()),
        "metrics": {
            f"{record.task}/{record.metric}": sum(record.values) / len(record.values) for record in task_results
        },
        "seconds": time.monotonic() - start,
    }


def records(
    results: Mapping[str, Any], samples: Mapping[str, Sequence[Mapping[str, Any]]], metrics: Sequence[str] = ()
) -> list[TaskResult]:
    """lm-eval's results and samples as records: of each task the metrics that are means over its documents, first filter.

    A metric such as bleu exists for all documents together only, and is left out. Raises ConfigError when one
    of `metrics` isn't there, or none at all.
    """
    candidates = [record for task, documents in samples.items() for record in _of_task(task, documents, results)]
    for task in samples:
        present = [record.metric for record in candidates if record.task == task]
        missing = [metric for metric in metrics if metric not in present]
        if missing or not present:
            absent = f"{', '.join(missing)} is not" if present else "no metric is"
            raise ConfigError(
                f"{task}: {absent} a mean over its documents",
                key="evaluate.tasks.metrics",
                allowed=", ".join(present) or "a task with a metric that is a mean over its documents, such as acc",
                remedy="name those in evaluate.tasks.metrics, or take another task",
            )
    return [record for record in candidates if not metrics or record.metric in metrics]


def _of_task(task: str, documents: Sequence[Mapping[str, Any]], results: Mapping[str, Any]) -> list[TaskResult]:
    first = [sample for sample in documents if sample["filter"] == documents[0]["filter"]]
    ids = tuple(f"{sample['doc_id']}-{sample['doc_hash'][:12]}" for sample in first)
    task_results = []
    for metric in first[0]["metrics"]:
        values = [sample.get(metric) for sample in first]
        whole = results["results"][task].get(f"{metric},{first[0]['filter']}")
        if not all(isinstance(value, Real) and math.isfinite(value) for value in [*values, whole]):
            continue
        numbers = tuple(float(value) for value in values)  # type: ignore[arg-type]
        if math.isclose(sum(numbers) / len(numbers), float(whole), rel_tol=1e-9, abs_tol=1e-12):
            higher = bool(results["higher_is_better"][task].get(metric, True))
            task_results.append(TaskResult(task=task, metric=metric, higher_is_better=higher, ids=ids, values=numbers))
    return task_results


def _prepare(entry: TaskConfig, folder: Path) -> None:
    """Set the process up before lm-eval is imported.

    The server is on this machine, past any proxy. A task of one's own reads its data beside its file, and no network.
    """
    os.environ |= {"NO_PROXY": "127.0.0.1,localhost", "TOKENIZERS_PARALLELISM": "false"}
    if not lm_eval_files.is_path(entry.task):
        return
    files = lm_eval_files.read(Path(entry.task))
    os.chdir(files[0].path.parent)
    if all(file.settings["dataset_path"] in lm_eval_files.LOADERS for file in files):
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "datasets")}


def _load(entry: TaskConfig) -> tuple[Any, dict[str, Any]]:
    """lm-eval's manager and its tasks, loaded: `tasks` and, of a named group, `groups` and `group_map`."""
    import evaluate
    from lm_eval.api.registry import metric_registry
    from lm_eval.tasks import TaskManager

    _sandbox_templates()
    foreign: list[str] = []

    def refuse(name: str, *_: Any, **__: Any) -> None:
        foreign.append(name)
        raise ConfigError(
            f"metric {name} is code of the hub, which is never run",
            key="metric_list",
            remedy="score by a metric of lm-eval's own",
        )

    evaluate.load = refuse
    own = lm_eval_files.is_path(entry.task)
    names = [str(file.path) for file in lm_eval_files.read(Path(entry.task))] if own else [entry.task]
    manager = TaskManager(include_defaults=not own)
    try:
        catalogue: dict[str, Any] = dict(manager.load(names))
    except Exception as error:
        if not foreign:
            raise ConfigError(
                f"lm-eval can't load {entry.task}: {type(error).__name__}: {error}",
                key="evaluate.tasks.task",
                remedy="correct the task; a dataset of the hub needs the network, or the hub's cache",
            ) from error
    if foreign:
        raise ConfigError(
            f"{entry.task} uses the metric {', '.join(foreign)}, which isn't lm-eval's own",
            key="metric_list",
            allowed=", ".join(sorted(metric_registry)),
            remedy="score by one of those; code of the hub is never run",
        )
    return manager, catalogue


def _sandbox_templates() -> None:
    """Render tasks' templates without access to Python's insides."""
    from jinja2.sandbox import SandboxedEnvironment
    from lm_eval import utils

    sandbox = SandboxedEnvironment(undefined=utils.env.undefined, keep_trailing_newline=True)
    sandbox.filters.update(utils.env.filters)
    utils.env = sandbox


def _endpoint(request: program.Request, tasks: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """lm-eval's name for the API that fits the tasks' kind, and its arguments for this server."""
    kinds = {str(task.OUTPUT_TYPE) for task in tasks.values()}
    if len(kinds) > 1 and "generate_until" in kinds:
        raise ConfigError(
            f"{request.config['task']['task']} has tasks of several kinds: {', '.join(sorted(kinds))}",
            key="evaluate.tasks.task",
            remedy="name its tasks one by one: those that generate go to another endpoint",
        )
    config = request.config
    common = {
        "model": config["model"], "num_concurrent": config["concurrency"], "max_retries": ATTEMPTS, "timeout": TIMEOUT_S,
        "seed": config["seed"], "max_length": config["max_model_len"],
    }  # fmt: skip
    if kinds == {"generate_until"}:
        chat = {"base_url": f"{config['url']}/v1/chat/completions", "tokenizer_backend": "none"}
        return "local-chat-completions", {**common, **chat}
    plain = {
        "base_url": f"{config['url']}/v1/completions",
        "tokenizer_backend": "huggingface",
        "tokenized_requests": True,
    }
    return "local-completions", {**common, **plain, "tokenizer": config["model_path"]}


def _evaluate(
    entry: TaskConfig,
    manager: Any,
    catalogue: Mapping[str, Any],
    api: str,
    arguments: dict[str, Any],
    request: program.Request,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run lm-eval and let it write its files; returns its results and its samples."""
    from lm_eval import simple_evaluate
    from lm_eval.loggers import EvaluationTracker

    inner = {name for children in catalogue.get("group_map", {}).values() for name in children}
    groups = [group for name, group in catalogue.get("groups", {}).items() if name not in inner]
    chat, seed = api == "local-chat-completions", request.config["seed"]
    tracker = EvaluationTracker(output_path=str(request.payload))
    results = simple_evaluate(
        model=api,
        model_args=arguments,
        tasks=groups or list(catalogue["tasks"].values()),
        num_fewshot=entry.num_fewshot,
        limit=entry.limit,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
        gen_kwargs={"temperature": 0.0, "do_sample": False} if chat else None,
        task_manager=manager,
        evaluation_tracker=tracker,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )
    samples: dict[str, Any] = results.pop("samples")
    tracker.save_results_aggregated(results=results, samples=samples)
    for name, documents in samples.items():
        tracker.save_results_samples(task_name=name, samples=documents)
    if not any(request.payload.rglob("results_*.json")):  # lm-eval only logs that it couldn't write
        raise StageFailed(
            "lm-eval wrote no results",
            file=str(request.folder / "log.txt"),
            remedy="read the log file, then run the same command again",
        )
    return results, samples


if __name__ == "__main__":
    program.main(run)
