"""`tunegate promote` and `rollback`: an approved version goes behind the proxy, or the release before it comes back."""

from __future__ import annotations

import argparse

from flows import progress
from flows.commands.housekeeping import print_status, versions_soon
from flows.commands.review import one_name
from pipeline.artifacts import Release
from pipeline.config.schema import Config
from pipeline.deployment import promote as deployment
from pipeline.deployment import state, steps
from pipeline.environments.interpreters import Environment
from pipeline.errors import RegistryError, ReviewError
from pipeline.registry import versions
from pipeline.registry.versions import Version
from pipeline.serving import runtimes


def promote(options: argparse.Namespace) -> int:
    """Put an approved version behind the proxy.

    Raises ReviewError when no version is approved or the unit changed, ServingError when the new server doesn't start.
    """
    name = one_name(options.name)
    release = versions.release(name, options.version)
    config = versions.config_of(release.run_id)
    environment = runtimes.environment_of(config.model_dump(mode="json"))
    if options.dry_run:
        steps.verify(release, config, environment)
        print(
            f"{name} v{release.version} is approved by {release.approval.reviewer} and unchanged: unit {release.unit.digest[:12]}"
        )
        print(f"steps: {', '.join(step.says for step in steps.STEPS.values())}")
        loss = deployment.loss(name, config)
        print(f"not lossless: {loss}" if loss else "no request is dropped: the proxy stays as it is")
        return 0
    _bring(release, config, environment)
    return print_status(name)


def rollback(options: argparse.Namespace) -> int:
    """Put the release before this one back; raises ReviewError when none was live, or when it isn't approved any more."""
    name = one_name(options.name)
    earlier = deployment.previous(name)
    if earlier is None:
        raise ReviewError("no release was live before this one", key=name, remedy=f"tunegate review {name}")
    release, config = _as_decided_now(earlier.release), earlier.settings()
    if options.dry_run:
        print(f"would put back {name} v{release.version}, unit {release.unit.digest[:12]}")
        return 0
    _bring(release, config, runtimes.environment_of(config.model_dump(mode="json")))
    return print_status(name)


def _as_decided_now(release: Release) -> Release:
    """A release that was live, with its decision in MLflow now; raises ReviewError when it was rejected since.

    A rollback doesn't wait for MLflow to come back: without it, the decision that it was promoted by counts.
    """
    name, number = release.name, release.version
    try:
        all_versions = versions_soon(name)
    except RegistryError as error:
        return _as_decided_then(release, error.problems[0].what)
    unit_and_number = (number, release.unit)
    version = next((entry for entry in all_versions if (entry.version, entry.unit) == unit_and_number), None)
    if version is None:
        return _as_decided_then(release, f"MLflow knows no version {number} of {name} with this unit")
    if version.approval is not None and version.approval.decision == "approved":
        return release.model_copy(update={"approval": version.approval})
    raise _not_approved(version, all_versions)


def _not_approved(version: Version, all_versions: list[Version]) -> ReviewError:
    """The error for a version that can't be put back; the next older approved one is what to promote instead."""
    approval, live = version.approval, state.read(version.name).live
    decision = f"{approval.decision} by {approval.reviewer}: {approval.reason}" if approval else "waiting for review"
    passed_by = {version.version, live.release.version if live else None}
    choices = [entry.version for entry in all_versions if _is_approved(entry) and entry.version not in passed_by]
    older = [number for number in choices if int(number) < int(version.version)]
    instead = f"tunegate promote {version.name} --version {(older or choices)[0]}" if choices else None
    return ReviewError(
        f"version {version.version}, which was live before, is {decision}; only an approved version is put back",
        key=version.name,
        allowed=", ".join(choices) or "an approved version",
        remedy=instead or f"tunegate review {version.name}",
    )


def _is_approved(version: Version) -> bool:
    return version.approval is not None and version.approval.decision == "approved"


def _as_decided_then(release: Release, why: str) -> Release:
    approval = release.approval
    print(
        f"{why}; v{release.version} was {approval.decision} by {approval.reviewer} when it was promoted, and that counts"
    )
    return release


def _bring(release: Release, config: Config, environment: Environment | None) -> None:
    """Promote a release. Only this imports Prefect, which is slow: a dry run and an error come at once."""
    from flows import promote as promotion

    with progress.shown() as on_event:
        promotion.run(release, config, environment, on_event)
