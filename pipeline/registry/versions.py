"""Registered versions, one for each passing served unit, and people's decisions on them.

An approval is a tag on the version that names the digest of the served unit; aliases (`candidate`, `champion`) only point.
Limit: MLflow knows no roles, so anybody who may write there may forge a decision.
"""

from __future__ import annotations

import logging
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from mlflow.exceptions import MlflowException
from pydantic import ConfigDict, ValidationError

from pipeline import store
from pipeline.artifacts import Approval, Build, Outcome, Record, Release, ServedUnit
from pipeline.config.schema import Config
from pipeline.errors import Problem, RegistryError, ReviewError
from pipeline.registry import runs, weights
from pipeline.registry.client import artifact_uri, asking, local_folder, shown
from pipeline.registry.runs import BUILD, CONFIG, UNIT_DIGEST, VERDICT
from pipeline.report import render

log = logging.getLogger(__name__)

# Tags of a version, by which people search in MLflow
UNIT = "tunegate.unit"
APPROVAL = "tunegate.approval"
DECISION = "tunegate.decision"  # followed by its time: all decisions stay
FOLDER = "tunegate.model_digest"
PLACE = "tunegate.model_path"
# Tag of a registered model
OURS = "tunegate.registered"
# Characters: MLflow's database holds so many of a description; a longer reason is refused
DESCRIPTION, REASON = 5000, 2000


class Version(Record):
    """A registered version as a reviewer sees it.

    `verdict` is the newest judgement on this unit, `place` where the weights lie in its run.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    name: str
    version: str
    run_id: str
    unit: ServedUnit
    build_key: str
    model_digest: str
    place: str
    verdict: Outcome
    approval: Approval | None
    aliases: tuple[str, ...]
    created: datetime


def register(run_id: str, build: Build) -> str:
    """Make a passing build a model version with the alias `candidate`, and return its number.

    The same unit of the same run is registered once; registering it again notes its newest verdict.
    Raises RegistryError when the verdict isn't a pass or the weights are no longer what was judged.
    """
    if build.verdict is None or build.verdict.outcome != "pass" or build.verdict.unit_digest != build.unit.digest:
        raise RegistryError(
            "only a build whose verdict is a pass for this very unit is registered",
            key=build.name,
            remedy="tunegate run CONFIG",
        )
    earlier = note_verdict(run_id, build)
    if earlier:
        if earlier.approval is None:
            _point("candidate", build.name, earlier.version)
        return earlier.version
    place, model_digest = weights.put(run_id, build)
    _make_registered_model(build.name)
    tags = {
        UNIT_DIGEST: build.unit.digest,
        UNIT: build.unit.model_dump_json(),
        VERDICT: build.verdict.outcome,
        FOLDER: model_digest,
        PLACE: place,
        BUILD: build.key,
    }
    source = f"{artifact_uri(run_id)}/{place}"
    with asking() as client:
        entry = client.create_model_version(build.name, source, run_id, tags=tags, description=_description(build))
    _point("candidate", build.name, str(entry.version))
    return str(entry.version)


def note_verdict(run_id: str, build: Build) -> Version | None:
    """Write the newest verdict on the build's version, if it has one: measured again, it may pass or no longer pass.

    Returns the version as it was before.
    """
    earlier = _of_this_build(run_id, build)
    if earlier and build.verdict:
        with asking() as client:
            client.set_model_version_tag(earlier.name, earlier.version, VERDICT, build.verdict.outcome)
    return earlier


def versions(name: str) -> list[Version]:
    """Every version of a model that tunegate registered, newest first; [] for a name never registered."""
    with asking() as client:
        entries = list(client.search_model_versions(f"name = '{_quotable(name)}'"))
    pointing: dict[str, list[str]] = {}
    for alias, number in sorted(_aliases(name).items() if entries else ()):
        pointing.setdefault(number, []).append(alias)
    records = [_record(entry, tuple(pointing.get(str(entry.version), ()))) for entry in entries if UNIT in entry.tags]
    return sorted((record for record in records if record), key=lambda record: int(record.version), reverse=True)


def names() -> list[str]:
    """The names of the models that tunegate registered, sorted."""
    models: list[str] = []
    token: str | None = None
    while True:
        with asking() as client:
            page_of = client.search_registered_models(f"tags.`{OURS}` = 'true'", max_results=100, page_token=token)
        models += [model.name for model in page_of]
        token = page_of.token
        if not token:
            return sorted(models)


def version(name: str, number: str) -> Version:
    """One version; raises ReviewError with the numbers of the registered ones."""
    records = versions(name)
    match = next((record for record in records if record.version == number), None)
    if match is None:
        raise ReviewError(
            f"version {number} is not registered",
            key=name,
            allowed=", ".join(record.version for record in records) or "none is registered",
            remedy=f"tunegate review {name}",
        )
    return match


def decide(name: str, number: str, decision: Literal["approved", "rejected"], reviewer: str, reason: str) -> Approval:
    """Record a person's decision on the digest of a version; all stay in its tags, the newest counts.

    Raises ReviewError for an unknown version, a missing reviewer, a rejection without a reason, or an approval of a version
    whose verdict isn't a pass.
    """
    target = version(name, number)
    problems = []
    if not reviewer.strip():
        problems.append(Problem("a decision needs a reviewer", key="reviewer", remedy="add --reviewer NAME"))
    if decision == "rejected" and not reason.strip():
        problems.append(Problem("a rejection needs a reason", key="reason", remedy='add --reason "…"'))
    if len(reason) > REASON:
        problems.append(
            Problem(
                f"the reason has {len(reason)} characters",
                key="reason",
                allowed=f"at most {REASON}",
                remedy="shorten it",
            )
        )
    if decision == "approved" and target.verdict != "pass":
        problems.append(
            Problem(
                f"the gate's newest verdict on version {number} is {target.verdict}",
                key=name,
                allowed="pass",
                remedy="tunegate run CONFIG",
            )
        )
    if problems:
        raise ReviewError(problems)
    approval = Approval(
        decision=decision,
        reviewer=reviewer.strip(),
        reason=reason.strip(),
        unit_digest=target.unit.digest,
        at=datetime.now(UTC),
    )
    with store.lock(f"decide/{name}"), asking() as client:  # MLflow fails two that write at once
        client.set_model_version_tag(
            name, number, f"{DECISION}.{approval.at:%Y%m%dT%H%M%S.%fZ}", approval.model_dump_json()
        )
        client.set_model_version_tag(name, number, APPROVAL, approval.model_dump_json())
        if "candidate" in target.aliases:
            client.delete_registered_model_alias(name, "candidate")
    return approval


def release(name: str, number: str | None = None) -> Release:
    """The approved version, as `promote` may serve it; without `number` the newest approved one.

    Raises ReviewError when none is approved, or when the approval names another digest than the version.
    """
    records = [version(name, number)] if number else versions(name)
    if not records:
        raise ReviewError("no version is registered", key=name, remedy="tunegate run CONFIG")
    latest = next((record for record in records if record.approval and record.approval.decision == "approved"), None)
    if latest is None or latest.approval is None:
        newest = records[0]
        by = (
            f"rejected by {newest.approval.reviewer}: {newest.approval.reason}"
            if newest.approval
            else "waiting for review"
        )
        raise ReviewError(
            f"version {newest.version} is {by}; nothing unapproved is promoted",
            key=name,
            allowed="an approved version",
            remedy=f"tunegate review {name}",
        )
    if latest.approval.unit_digest != latest.unit.digest:
        raise ReviewError(
            f"the approval of version {latest.version} names another served unit",
            key=name,
            remedy=f"tunegate review {name}, then approve it anew",
        )
    return _release(latest, latest.approval)


def waiting(name: str) -> list[Version]:
    """The versions that wait for a decision, newest first."""
    return [record for record in versions(name) if record.approval is None]


def champion(name: str) -> Release | None:
    """The release that the alias `champion` points to, or None without one; it serves even if it was rejected since.

    Raises RegistryError when the alias points to a version that can't be read or was never decided on: a candidate would be
    compared with nothing.
    """
    target = next((record for record in versions(name) if "champion" in record.aliases), None)
    if target and target.approval:
        return _release(target, target.approval)
    number = _aliases(name).get("champion")
    if number is None:
        return None
    why = (
        "which nobody decided on"
        if target
        else "whose tags can't be read: they were edited, or a newer tunegate wrote them"
    )
    raise RegistryError(
        f"the alias champion points to version {number}, {why}",
        key=name,
        allowed="an approved version that this tunegate can read",
        remedy=f"tunegate promote {name} --version N with an approved one, or use the tunegate that registered version {number}",
    )


def set_champion(name: str, number: str) -> None:
    """Point the alias `champion` to a version; MLflow moves it in one step, so at most one version has it."""
    _point("champion", name, number)


def model_path(record: Version) -> Path:
    """The version's model folder on this machine; a remote one is downloaded once.

    Raises RegistryError when it is gone or changed since it was judged.
    """
    label = f"{record.name} version {record.version}"
    return weights.fetch(record.run_id, record.place, record.model_digest, label)


def config_of(run_id: str) -> Config:
    """The resolved config that a run's build was made from.

    Raises RegistryError when the run's file isn't there.
    """
    return Config.model_validate_json(runs.read_text(run_id, CONFIG))


def page(name: str, number: str | None, run_id: str) -> str:
    """The page on a version, or on a run without one: a server's URL, else a file."""
    root = os.environ.get("MLFLOW_TRACKING_URI", "")
    note = store.home() / "services" / "mlflow-url"
    if not root.startswith("http") and note.is_file():
        root = note.read_text(encoding="utf-8").strip()
    if root.startswith("http"):
        with asking() as client:
            experiment = client.get_run(run_id).info.experiment_id
        tail = f"models/{quote(name)}/versions/{number}" if number else f"experiments/{experiment}/runs/{run_id}"
        return f"{shown(root).rstrip('/')}/#/{tail}"
    local = local_folder(artifact_uri(run_id))
    return str(local / "report.html") if local else f"MLflow run {run_id}"


def _release(record: Version, approval: Approval) -> Release:
    return Release(
        name=record.name,
        version=record.version,
        run_id=record.run_id,
        model_path=model_path(record),
        unit=record.unit,
        approval=approval,
    )


def _of_this_build(run_id: str, build: Build) -> Version | None:
    return next(
        (record for record in versions(build.name) if record.run_id == run_id and record.unit == build.unit),
        None,
    )


def _aliases(name: str) -> dict[str, str]:
    """Every alias of a model, also one set by hand, with its version; {} for a name never registered."""
    with asking() as client:
        try:
            return {alias: str(number) for alias, number in client.get_registered_model(name).aliases.items()}
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return {}


def _record(entry: Any, aliases: tuple[str, ...]) -> Version | None:
    """An MLflow version as a Version; None, and a warning, when its tags can't be read: edited, or of a newer tunegate."""
    try:
        return Version(
            name=entry.name,
            version=str(entry.version),
            run_id=entry.run_id,
            unit=ServedUnit.model_validate_json(entry.tags[UNIT]),
            build_key=entry.tags[BUILD],
            model_digest=entry.tags[FOLDER],
            place=entry.tags.get(PLACE, weights.UNNAMED),
            verdict=entry.tags[VERDICT],
            approval=Approval.model_validate_json(entry.tags[APPROVAL]) if APPROVAL in entry.tags else None,
            aliases=aliases,
            created=datetime.fromtimestamp(entry.creation_timestamp / 1000, UTC),
        )
    except (ValidationError, KeyError) as error:
        log.warning(
            "%s version %s in MLflow is left out, its tags can't be read: %s",
            entry.name,
            entry.version,
            error,
        )
        return None


def _quotable(name: str) -> str:
    """The name if it can stand in a filter; raises ReviewError for a name that MLflow refuses."""
    if "'" in name or not name:
        raise ReviewError(
            f"{name!r} is not a valid model name", allowed="letters, digits, . _ and -", remedy="tunegate review"
        )
    return name


def _description(build: Build) -> str:
    """The head of the model card, cut at a line's end."""
    card = render.model_card(build)
    return card if len(card) <= DESCRIPTION else card[:DESCRIPTION].rpartition("\n")[0]


def _make_registered_model(name: str) -> None:
    with asking() as client:
        try:
            client.create_registered_model(
                name, tags={OURS: "true"}, description="Built, gated and promoted by tunegate."
            )
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            client.set_registered_model_tag(name, OURS, "true")


def _point(alias: str, name: str, number: str) -> None:
    with asking() as client:
        client.set_registered_model_alias(name, alias, number)
