"""One MLflow run for each served unit of a build: its settings, curves, numbers, plots and the pages for a reviewer."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any, Literal

from mlflow.entities import Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException

from pipeline import store
from pipeline.artifacts import Artifact, Build
from pipeline.errors import RegistryError
from pipeline.files import write_json
from pipeline.plan import plan
from pipeline.registry.client import artifact_uri, asking, local_folder, tracking_uri
from pipeline.report import plots, render

# Tags, by which people search in MLflow
BUILD = "tunegate.build"
UNIT_DIGEST = "tunegate.unit_digest"
VERDICT = "tunegate.verdict"
DESCRIBED = "tunegate.config"
NOTE = "mlflow.note.content"
# Files of a run
CONFIG, RECORD = "config.json", "build.json"
# MLflow's own limits: entries of a batch, and characters of a parameter's and a tag's text
BATCH, METRIC_BATCH = 100, 1000
PARAM_LENGTH, TAG_LENGTH, KEY_LENGTH = 6000, 5000, 250


@dataclass(frozen=True)
class Point:
    """One point of a curve; `at` is in milliseconds since 1970."""

    name: str
    value: float
    step: int
    at: int


def open_run(
    name: str, build_key: str, config: Mapping[str, Any], digests: Mapping[str, str | None] = MappingProxyType({})
) -> str:
    """The MLflow run that this build continues, or a new one with the config as parameters.

    `digests` has the digest of each artefact that the store holds, by stage, and None for one still to be made. A run that
    belongs to a unit is continued only if it recorded exactly these artefacts: a rebuilt one may become another unit.
    Raises RegistryError when MLflow can't be reached, or when its experiment was deleted.
    """
    runs = _runs(name, build_key)
    same = [run for run in runs if UNIT_DIGEST in run.data.tags and _holds(run, digests)]
    without_unit = [run for run in runs if UNIT_DIGEST not in run.data.tags]
    return _started(name, build_key, config, next(iter(same + without_unit), None))


def run_of_unit(run_id: str, name: str, build_key: str, config: Mapping[str, Any], unit_digest: str) -> str:
    """The run of this unit: its own, else `run_id` unless that belongs to another unit, else a new one.

    A version's numbers and pages lie in its run; another unit's must never replace them.
    """
    with asking() as client:
        digest_of_run = client.get_run(run_id).data.tags.get(UNIT_DIGEST)
        if digest_of_run == unit_digest:
            return run_id
        own = next((run for run in _runs(name, build_key) if run.data.tags.get(UNIT_DIGEST) == unit_digest), None)
        if digest_of_run is None and own is None:
            client.set_tag(run_id, UNIT_DIGEST, unit_digest)
            return run_id
        unit_run = _started(name, build_key, config, own)
        client.set_tag(unit_run, UNIT_DIGEST, unit_digest)
        if digest_of_run is None:
            client.set_tag(run_id, NOTE, f"Made again what the run {unit_run} holds; the build went on there.")
    close_run(run_id, "FINISHED")
    return unit_run


def _runs(name: str, build_key: str) -> list[Run]:
    """The build's runs, newest first."""
    with asking() as client:
        return list(client.search_runs([_experiment(name)], f"tags.`{BUILD}` = '{build_key}'"))


def _holds(run: Run, digests: Mapping[str, str | None]) -> bool:
    return all(digest and run.data.tags.get(_mark(stage)) == digest for stage, digest in digests.items())


def _mark(stage: str) -> str:
    """The tag with the digest of the stage's artefact."""
    return f"tunegate.{stage}.digest"


def _started(name: str, build_key: str, config: Mapping[str, Any], run: Run | None) -> str:
    """The run, running again, or a new one; described by the config."""
    with asking() as client:
        if run:
            run_id, tags = str(run.info.run_id), run.data.tags
            client.update_run(run_id, status="RUNNING")
        else:
            new = client.create_run(_experiment(name), run_name=f"{name}-{build_key[:8]}", tags={BUILD: build_key})
            run_id, tags = str(new.info.run_id), {}
        if DESCRIBED not in tags:  # a killed build may have got no further than the run's id
            for params in _batches([Param(key, str(setting)[:PARAM_LENGTH]) for key, setting in _flat(config)], BATCH):
                client.log_batch(run_id, params=params)
            client.log_dict(run_id, dict(config), CONFIG)
            client.set_tag(run_id, DESCRIBED, CONFIG)
    refresh(run_id, config)
    return run_id


def refresh(run_id: str, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Take over the config's sections that aren't judged (plan.NOT_JUDGED), such as the proxy's port; return the changed ones.

    Only the run's file is written, which promotion reads: MLflow's parameters stay, and so does the build's own record of
    its config. Raises RegistryError when MLflow can't be reached.
    """
    local = local_folder(artifact_uri(run_id))
    is_lost = local is not None and not (local / CONFIG).is_file()
    on_record = {} if is_lost else json.loads(read_text(run_id, CONFIG))
    now = {**(config if is_lost else on_record), **{name: config[name] for name in plan.NOT_JUDGED if name in config}}
    changes = tuple(name for name in now if now[name] != on_record.get(name))
    if changes and local is not None:
        local.mkdir(parents=True, exist_ok=True)
        write_json(local / CONFIG, now)
    elif changes:
        with asking() as client:
            client.log_dict(run_id, now, CONFIG)
    return changes


def take_over(summary: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[str, ...]:
    """`refresh` the run of a finished build, given its summary (store.peek_build); a build without a version is left alone."""
    return refresh(str(summary["run_id"]), config) if summary["version"] else ()


def log_points(run_id: str, points: Sequence[Point]) -> None:
    """Add points to the run's curves in one request for a thousand of them."""
    with asking() as client:
        for batch in _batches([Metric(_safe(p.name), p.value, p.at, p.step) for p in points], METRIC_BATCH):
            client.log_batch(run_id, metrics=batch)


def log_artifact(run_id: str, artifact: Artifact) -> None:
    """Record a stage's artefact in the run: digest and versions as tags, numbers as metrics, plots as files.

    An artefact that the run has already is left alone.
    """
    stage = artifact.stage
    mark = _mark(stage)
    details = [(key, detail) for key, detail in _flat(artifact.detail) if detail is not None]
    tags = [
        RunTag(f"tunegate.{stage}.{_safe(key)}"[:KEY_LENGTH], detail[:TAG_LENGTH])
        for key, detail in details
        if isinstance(detail, str)
    ]
    tags.append(RunTag(f"tunegate.{stage}.made_by", json.dumps(artifact.made_by)[:TAG_LENGTH]))
    numbers = [(f"{stage}/{key}", float(detail), 0) for key, detail in details if isinstance(detail, int | float)]
    with asking() as client:
        if client.get_run(run_id).data.tags.get(mark) == artifact.digest:
            return
        _log_numbers(run_id, numbers)
        for batch in _batches(tags, BATCH):
            client.log_batch(run_id, tags=batch)
        if artifact.extra.is_dir():
            client.log_artifacts(run_id, str(artifact.extra), stage)
        client.set_tag(run_id, mark, artifact.digest)


def close_run(run_id: str, status: Literal["FINISHED", "FAILED", "KILLED"]) -> None:
    """Set how the run ended."""
    with asking() as client:
        client.set_terminated(run_id, status)


def record_build(run_id: str, build: Build) -> None:
    """Put everything for a reviewer into the run: scores, verdict, digests, items, plots, card, one page."""
    _log_numbers(run_id, _measurements(build))
    card = render.model_card(build)
    tags = {
        VERDICT: build.verdict.outcome if build.verdict else "none",
        UNIT_DIGEST: build.unit.digest,
        NOTE: card,
    }
    with TemporaryDirectory() as folder:
        _write_pages(build, card, Path(folder))
        with asking() as client:
            client.log_batch(run_id, tags=[RunTag(key, text) for key, text in tags.items()])
            client.log_artifacts(run_id, folder)


def _write_pages(build: Build, card: str, root: Path) -> None:
    """All files that a reviewer may open."""
    texts = {
        "model_card.md": card,
        "report.html": render.html(build),
        "report.json": render.to_json(build),
        "unit.json": build.unit.model_dump_json(indent=1),
        RECORD: build.model_dump_json(),
    }
    if build.verdict:
        texts["verdict.json"] = build.verdict.model_dump_json(indent=1)
    for role, evaluation in build.evaluations.items():
        texts[f"evaluations/{role}.jsonl"] = "".join(item.model_dump_json() + "\n" for item in evaluation.items)
    for role, loadtest in build.loadtests.items():
        texts[f"loadtests/{role}.json"] = loadtest.model_dump_json(indent=1)
    for name, text in texts.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    (root / "plots").mkdir()
    plots.save_plots(build, root / "plots")


def read_text(run_id: str, name: str) -> str:
    """One of the run's text files; raises RegistryError when it is gone."""
    local = local_folder(artifact_uri(run_id))
    try:
        if local:
            return (local / name).read_text(encoding="utf-8")
        with asking() as client, TemporaryDirectory() as folder:
            return Path(client.download_artifacts(run_id, name, folder)).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RegistryError(
            f"{name} of the MLflow run {run_id} is gone",
            file=str(local or ""),
            remedy="restore it, or build anew: tunegate run CONFIG",
        ) from None


def _experiment(name: str) -> str:
    """The id of the experiment of that name, made where it is missing; another run may make it just then."""
    with asking() as client:
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            local = tracking_uri().startswith("sqlite:")
            place = (store.home() / "artifacts" / name).as_uri() if local else None
            try:
                return str(client.create_experiment(name, place))
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                experiment = client.get_experiment_by_name(name)
    if experiment is None:
        raise RegistryError(f"the MLflow experiment {name} is gone again", key=name, remedy="tunegate run CONFIG")
    if experiment.lifecycle_stage == "deleted":
        raise RegistryError(
            f"the MLflow experiment {name} was deleted",
            key=name,
            allowed="an active experiment",
            remedy=f"mlflow experiments restore --experiment-id {experiment.experiment_id}",
        )
    return str(experiment.experiment_id)


def _measurements(build: Build) -> Iterator[tuple[str, float, int]]:
    """Every number worth a chart: name, value, step (concurrency for load)."""
    for role, evaluation in build.evaluations.items():
        for name, interval in evaluation.metrics.items():
            yield f"{role}/{name}", interval.value, 0
            yield f"{role}/{name}_low", interval.low, 0
            yield f"{role}/{name}_high", interval.high, 0
        yield f"{role}/errors", float(evaluation.errors), 0
    for role, loadtest in build.loadtests.items():
        for level in loadtest.levels:
            for name, values in level.metrics.items():
                if values:
                    yield f"{role}/{name}", sum(values) / len(values), level.max_concurrency


def _log_numbers(run_id: str, numbers: Iterable[tuple[str, float, int]]) -> None:
    now = int(time.time() * 1000)
    log_points(run_id, [Point(name, number, step, now) for name, number, step in numbers])


def _batches(entries: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(entries), size):
        yield entries[start : start + size]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings as dotted keys; lists stay whole, as JSON."""
    for key, inner in tree.items():
        if isinstance(inner, Mapping):
            yield from _flat(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json.dumps(inner) if isinstance(inner, list | tuple) else inner


def _safe(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "_-./ " else "_" for letter in name)[:KEY_LENGTH]
