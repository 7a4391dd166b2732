"""The systems that a build measures: base, merged, candidate and incumbent, each a folder with the unit that serves it.

The incumbent is served as it was judged. When vLLM or the machine changed since, so that this is impossible, it is measured
as today's settings would serve it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from flows.stages import OnEvent
from pipeline.artifacts import Artifact, Release, ServedUnit, Stage
from pipeline.config.schema import Config
from pipeline.errors import EnvironmentMissing, Problem, RegistryError, ServingError
from pipeline.registry import versions
from pipeline.serving import runtimes
from pipeline.serving import serve as serving


@dataclass(frozen=True)
class System:
    """A model folder in a role, and the config that serves it: the incumbent keeps the config that it was judged with."""

    role: str
    model: Path
    unit: ServedUnit
    config: Config


def systems(config: Config, artifacts: Mapping[Stage, Artifact], unit: ServedUnit, show: OnEvent) -> list[System]:
    """The systems to measure, in order; merged is left out where it is itself the candidate."""
    environment = runtimes.environment_of(config.model_dump(mode="json"))
    measurable = []
    for role in config.evaluate.compare:
        model = artifacts["base" if role == "base" else "merge"].payload
        own_unit = serving.served_unit(model, config.serve, config.name, environment)
        if own_unit.digest != unit.digest:
            measurable.append(System(role, model, own_unit, config))
    candidate = artifacts["quantize" if "quantize" in artifacts else "merge"].payload
    measurable.append(System("candidate", candidate, unit, config))
    champion = versions.champion(config.name)
    if champion and champion.unit.digest != unit.digest:
        measurable.append(_incumbent(champion, config, show))
    return measurable


def _incumbent(champion: Release, config: Config, show: OnEvent) -> System:
    """The champion, served with the config that it was judged with, or with today's where that is impossible here."""
    for own_config in (versions.config_of(champion.run_id), config):
        try:
            environment = runtimes.environment_of(own_config.model_dump(mode="json"))
            unit = serving.served_unit(champion.model_path, own_config.serve, config.name, environment)
        except (EnvironmentMissing, ServingError) as error:
            problem = error.problems[0]
            continue
        _must_be_the_champion(champion, unit)
        if unit.digest != champion.unit.digest:
            fields = [name for name in ServedUnit.model_fields if getattr(unit, name) != getattr(champion.unit, name)]
            text = (
                f"v{champion.version} can't be served as it was judged; it is measured with today's {', '.join(fields)}"
            )
            show({"event": "message", "text": text})
        return System("incumbent", champion.model_path, unit, own_config)
    raise ServingError(
        f"v{champion.version}, the champion, can't be served here: {problem.what}",
        key="serve",
        remedy=f"{problem.remedy or 'correct serve in the config'}; or promote another version: tunegate promote {champion.name}",
    )


def _must_be_the_champion(champion: Release, unit: ServedUnit) -> None:
    """Raise RegistryError unless the champion's folder is as approved: the candidate is compared with the approved model."""
    problems = [
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
    if problems:
        raise RegistryError(problems)
