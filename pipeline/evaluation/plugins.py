"""Scorers of a user's own: what an installed package registers as entry points of the group `tunegate.scorers`.

A scorer is a callable `(prompt, expected, answer) -> float | dict[str, float]`: the conversation so far as messages, the
holdout's answer, the model's; scores lie between 0 and 1. A dict's scores stand under NAME/KEY and their mean under NAME, as
json_field_match has it; every item must have the same keys. It is called once an item, one at a time.

Which there are is read from metadata: nothing is imported until the first answer is scored, in the control environment.
Standard library only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import ConfigError, Problem

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

GROUP = "tunegate.scorers"
BUILT_IN = ("exact_match", "accuracy", "json_valid", "json_field_match", "token_f1", "rougeL")

Prompt = Sequence[Mapping[str, str]]


class ScorerBroken(Exception):
    """A scorer of a user's own raised, or returned what is no score; the message names it."""

    def __init__(self, name: str, what: str) -> None:
        super().__init__(f"{_described(name)} {what}")
        self.name = name


def problems(metrics: Iterable[str]) -> list[Problem]:
    """What is wrong with the scorers of these names, in the order of `evaluate.scorers`."""
    found = []
    for index, name in enumerate(metrics):
        if name in BUILT_IN:
            continue
        installed, key = _installed(), f"evaluate.scorers[{index}].metric"
        if name not in installed:
            known = ", ".join([*BUILT_IN, *sorted(installed)])
            import difflib

            close = difflib.get_close_matches(name, [*BUILT_IN, *installed], n=1, cutoff=0.6)
            found.append(
                Problem(
                    f"there is no scorer {name}",
                    key=key,
                    allowed=f"did you mean {close[0]}? There are {known}" if close else known,
                    remedy=f"correct it, or install the package that registers it in {GROUP} into the control environment",
                )
            )
        elif len({_made_by(entry) for entry in installed[name]}) > 1:
            owners = " and ".join(sorted(_made_by(entry) for entry in installed[name]))
            found.append(
                Problem(f"several packages register a scorer {name}", key=key, allowed=owners, remedy="uninstall one")
            )
    return found


def versions(metrics: Sequence[str]) -> dict[str, str]:
    """For each scorer that isn't built in the package and version that made it; raises ConfigError where there is none."""
    if wrong := problems(metrics):
        raise ConfigError(wrong)
    return {name: _made_by(_installed()[name][0]) for name in metrics if name not in BUILT_IN}


def places(metrics: Sequence[str]) -> tuple[Path, ...]:
    """The folders that these scorers' packages lie in, for another process that is to find the same ones."""
    owners = [_installed()[name][0].dist for name in metrics if name not in BUILT_IN]
    return tuple(dict.fromkeys(Path(str(owner.locate_file(""))) for owner in owners if owner))


def scorer(name: str) -> Callable[[Prompt, str, str | None], dict[str, float]]:
    """A function that scores (prompt, expected, answer) by the entry point of that name; None, a failed request, scores 0.

    It raises ScorerBroken: when it can't be imported, raises, or returns what is no score or another item's keys.
    """
    loaded: list[Callable[[list[dict[str, str]], str, str], object]] = []
    names: list[str] = []

    def score(prompt: Prompt, expected: str, answer: str | None) -> dict[str, float]:
        if answer is None and names:
            return dict.fromkeys(names, 0.0)
        if not prompt:
            raise ScorerBroken(name, "needs a prompt, and there is none where it was asked")
        if not loaded:
            loaded.append(_load(name))
        try:
            said = loaded[0]([dict(message) for message in prompt], expected, answer or "")
        except Exception as error:
            raise ScorerBroken(name, f"raised {type(error).__name__}: {error}") from error
        scores = _scores(name, said)
        if not names:
            names.extend(scores)
        if names != list(scores):
            raise ScorerBroken(name, f"gave {', '.join(scores)} here and {', '.join(names)} for the first item")
        return scores if answer is not None else dict.fromkeys(scores, 0.0)

    return score


def _installed() -> dict[str, list[EntryPoint]]:
    """The entry points of the group by name, of all packages that this process can import."""
    from importlib.metadata import entry_points  # here because `tunegate check` imports this module and seldom asks

    found: dict[str, list[EntryPoint]] = {}
    for entry in entry_points(group=GROUP):
        found.setdefault(entry.name, []).append(entry)
    return found


def _made_by(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else "no package"


def _described(name: str) -> str:
    entry = next(iter(_installed().get(name, [])), None)
    return f"the scorer {name} ({entry.value} of {_made_by(entry)})" if entry else f"the scorer {name}"


def _load(name: str) -> Callable[[list[dict[str, str]], str, str], object]:
    versions([name])
    try:
        loaded = _installed()[name][0].load()
    except Exception as error:
        raise ScorerBroken(name, f"can't be imported: {type(error).__name__}: {error}") from error
    if not callable(loaded):
        raise ScorerBroken(name, f"is no function but {loaded!r:.80}")
    return loaded  # type: ignore[no-any-return]


def _scores(name: str, said: object) -> dict[str, float]:
    """The returned value as scores by metric."""
    if not isinstance(said, dict):
        return {name: _score(name, said, "")}
    if not said or not all(isinstance(key, str) and key for key in said):
        raise ScorerBroken(name, f"returned {said!r:.80}, whose keys are no names")
    each = {f"{name}/{key}": _score(name, value, f" for {key}") for key, value in sorted(said.items())}
    return {name: sum(each.values()) / len(each), **each}


def _score(name: str, value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ScorerBroken(name, f"returned {value!r:.80} ({type(value).__name__}){where}, not a number from 0 to 1")
    number = float(value)
    if not 0 <= number <= 1:  # nor NaN
        raise ScorerBroken(name, f"returned {number}{where}, outside 0 to 1")
    return number
