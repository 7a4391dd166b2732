"""The systems that a build measures: base, merged, candidate and incumbent, each a folder with the unit that serves it.

The incumbent is served as it was judged. Where that can't be any more, because vLLM or the machine is another by now, it is
measured as it would be served today.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.stages import OnEvent
from pipeline.artifacts import Artifact, Release, ServedUnit, Stage
from pipeline.config.schema import Config
from pipeline.errors import EnvironmentMissing, Problem, RegistryError, ServingError
from pipeline.registry import versions
from pipeline.serving import runtimes
from pipeline.serving import serve as serving


@dataclass(frozen=True)
class System:
    """A model folder in a role, and the config that it is served with: the incumbent keeps the one it was judged with."""

    role: str
    model: Path
    unit: ServedUnit
    config: Mapping[str, Any]


def systems(
    config: Mapping[str, Any], artifacts: Mapping[Stage, Artifact], unit: ServedUnit, show: OnEvent
) -> list[System]:
    """The systems to measure, in order; merged is left out where it is itself the candidate."""
    settings = Config.model_validate(config)
    environment = runtimes.environment_of(config)
    found = []
    for role in settings.evaluate.compare:
        model = artifacts["base" if role == "base" else "merge"].payload
        other = serving.served_unit(model, settings.serve, settings.name, environment)
        if other.digest != unit.digest:
            found.append(System(role, model, other, config))
    candidate = artifacts["quantize" if "quantize" in artifacts else "merge"].payload
    found.append(System("candidate", candidate, unit, config))
    champion = versions.champion(settings.name)
    if champion and champion.unit.digest != unit.digest:
        found.append(_incumbent(champion, settings, config, show))
    return found


def _incumbent(champion: Release, settings: Config, config: Mapping[str, Any], show: OnEvent) -> System:
    """The champion with the settings it was judged with, or with today's where those can't be had here."""
    judged_with = versions.config_of(champion.run_id)
    for serve, whole in ((judged_with.serve, judged_with.model_dump(mode="json")), (settings.serve, config)):
        try:
            environment = runtimes.environment_of(whole)
            unit = serving.served_unit(champion.model_path, serve, settings.name, environment)
        except (EnvironmentMissing, ServingError) as error:
            why = str(error.problems[0].what)
            continue
        _must_be_the_champion(champion, unit)
        if unit.digest != champion.unit.digest:
            fields = [name for name in ServedUnit.model_fields if getattr(unit, name) != getattr(champion.unit, name)]
            text = (
                f"v{champion.version} can't be served as it was judged; it is measured with today's {', '.join(fields)}"
            )
            show({"event": "message", "text": text})
        return System("incumbent", champion.model_path, unit, whole)
    raise ServingError(f"v{champion.version}, the champion, can't be served here: {why}", key="serve")


def _must_be_the_champion(champion: Release, unit: ServedUnit) -> None:
    """Raise RegistryError when the champion's folder isn't what was approved: a candidate would be held against something else."""
    changed = [
        Problem(
            f"is {getattr(unit, part)[:12]}",
            file=str(champion.model_path),
            key=f"unit.{part}",
            allowed=f"{getattr(champion.unit, part)[:12]}, as v{champion.version} was approved",
            remedy=f"restore the folder, or give the alias champion of {champion.name} to another version",
        )
        for part in ("weights", "tokenizer", "configuration")
        if getattr(unit, part) != getattr(champion.unit, part)
    ]
    if changed:
        raise RegistryError(changed)
