"""Scorers of a user's own: what an installed package registers as entry points of the group `tunegate.scorers`.

A scorer is a callable `(prompt, expected, answer) -> float | dict[str, float]`: the conversation so far as messages, the
holdout's answer, the model's; scores lie between 0 and 1. A dict's scores stand under NAME/KEY and their mean under NAME, as
json_field_match has it; every item must have the same keys. It is called once an item, one at a time.

The names come from metadata: nothing is imported until the first answer is scored, in the control environment.
Standard library only, because `tunegate check` imports this module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import ConfigError, Problem
from pipeline.evaluation.scorers import SCORERS

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

GROUP = "tunegate.scorers"

Prompt = Sequence[Mapping[str, str]]


class ScorerBroken(Exception):
    """A scorer of a user's own raised, or didn't return scores; the message names it."""

    def __init__(self, name: str, fault: str) -> None:
        super().__init__(f"{_described(name)} {fault}")
        self.name = name


def problems(metrics: Iterable[str]) -> list[Problem]:
    """Names that aren't scorers, or are ambiguous, in the order of `evaluate.scorers`."""
    faults = []
    for index, name in enumerate(metrics):
        if name in SCORERS:
            continue
        entries, key = _installed(), f"evaluate.scorers[{index}].metric"
        if name not in entries:
            names = ", ".join([*SCORERS, *sorted(entries)])
            import difflib

            close = difflib.get_close_matches(name, [*SCORERS, *entries], n=1, cutoff=0.6)
            faults.append(
                Problem(
                    f"{name} is not a scorer",
                    key=key,
                    allowed=f"did you mean {close[0]}? There are {names}" if close else names,
                    remedy=f"correct it, or install the package that registers it in {GROUP} into the control environment",
                )
            )
        elif len({_made_by(entry) for entry in entries[name]}) > 1:
            owners = " and ".join(sorted(_made_by(entry) for entry in entries[name]))
            faults.append(
                Problem(
                    f"several packages register a scorer {name}",
                    key=key,
                    allowed=owners,
                    remedy="uninstall one of them from the control environment",
                )
            )
    return faults


def versions(metrics: Sequence[str]) -> dict[str, str]:
    """Package and version of each scorer that isn't built in; raises ConfigError for a name without a package."""
    if faults := problems(metrics):
        raise ConfigError(faults)
    return {name: _made_by(_installed()[name][0]) for name in metrics if name not in SCORERS}


def places(metrics: Sequence[str]) -> tuple[Path, ...]:
    """The folders that these scorers' packages lie in, for another process that is to find the same ones."""
    owners = [_installed()[name][0].dist for name in metrics if name not in SCORERS]
    return tuple(dict.fromkeys(Path(str(owner.locate_file(""))) for owner in owners if owner))


def scorer(name: str) -> Callable[[Prompt, str, str | None], dict[str, float]]:
    """A function that scores (prompt, expected, answer) by the entry point of that name; None, a failed request, scores 0.

    It raises ScorerBroken: when it can't be imported, raises, or returns anything but scores with the keys of the first item.
    """
    functions: list[Callable[[list[dict[str, str]], str, str], object]] = []
    names: list[str] = []

    def score(prompt: Prompt, reference: str, answer: str | None) -> dict[str, float]:
        if answer is None and names:
            return dict.fromkeys(names, 0.0)
        if not prompt:
            raise ScorerBroken(name, "needs a prompt, and was called without one")
        if not functions:
            functions.append(_load(name))
        try:
            output = functions[0]([dict(message) for message in prompt], reference, answer or "")
        except Exception as error:
            raise ScorerBroken(name, f"raised {type(error).__name__}: {error}") from error
        scores = _scores(name, output)
        if not names:
            names.extend(scores)
        if names != list(scores):
            raise ScorerBroken(name, f"gave {', '.join(scores)} here and {', '.join(names)} for the first item")
        return scores if answer is not None else dict.fromkeys(scores, 0.0)

    return score


def _installed() -> dict[str, list[EntryPoint]]:
    """The entry points of the group by name, of all packages that this process can import."""
    from importlib.metadata import entry_points  # here because `tunegate check` imports this module and seldom asks

    by_name: dict[str, list[EntryPoint]] = {}
    for entry in entry_points(group=GROUP):
        by_name.setdefault(entry.name, []).append(entry)
    return by_name


def _made_by(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else "no package"


def _described(name: str) -> str:
    entry = next(iter(_installed().get(name, [])), None)
    return f"the scorer {name} ({entry.value} of {_made_by(entry)})" if entry else f"the scorer {name}"


def _load(name: str) -> Callable[[list[dict[str, str]], str, str], object]:
    versions([name])
    try:
        function = _installed()[name][0].load()
    except Exception as error:
        raise ScorerBroken(name, f"can't be imported: {type(error).__name__}: {error}") from error
    if not callable(function):
        raise ScorerBroken(name, f"is not a function but {function!r:.80}")
    return function  # type: ignore[no-any-return]


def _scores(name: str, scores: object) -> dict[str, float]:
    """The returned value as scores by metric."""
    if not isinstance(scores, dict):
        return {name: _score(name, scores, "")}
    if not scores or not all(isinstance(key, str) and key for key in scores):
        raise ScorerBroken(name, f"returned {scores!r:.80}, whose keys are not names")
    parts = {f"{name}/{key}": _score(name, score, f" for {key}") for key, score in sorted(scores.items())}
    return {name: sum(parts.values()) / len(parts), **parts}


def _score(name: str, value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ScorerBroken(name, f"returned {value!r:.80} ({type(value).__name__}){where}, not a number from 0 to 1")
    number = float(value)
    if not 0 <= number <= 1:  # nor NaN
        raise ScorerBroken(name, f"returned {number}{where}, outside 0 to 1")
    return number
