"""Must-pass prompts in a report: first those that the champion passed and the candidate breaks, then the other broken ones."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.artifacts import Build, PromptResult


@dataclass(frozen=True)
class Broken:
    """A prompt that the candidate broke, the broken assertions, and the champion's answer where there is one."""

    id: str
    prompt: str
    broken: tuple[str, ...]
    answer: str
    champion: str | None


@dataclass(frozen=True)
class Prompts:
    """The number `asked`, and who passes: `lost` the champion only, `broken` neither, `mended` the candidate only."""

    asked: int
    with_champion: bool
    lost: tuple[Broken, ...]
    broken: tuple[Broken, ...]
    mended: tuple[str, ...]

    @property
    def said(self) -> str:
        """The counts in one sentence."""
        sentence = f"{self.asked - len(self.lost) - len(self.broken)} of {self.asked} must-pass prompts hold"
        if not self.with_champion:
            return f"{sentence}; there is no champion to compare with."
        counts = {"broken before": len(self.broken), "mended": len(self.mended)}
        parts = [f"{name}: {count}" for name, count in counts.items() if count]
        return f"{sentence}; {', '.join([f'broken since the champion: {len(self.lost)}', *parts])}."


def prompts(build: Build) -> Prompts | None:
    """The must-pass prompts' outcomes; None where the candidate was asked none."""
    if not (ours := build.prompts.get("candidate", ())):
        return None
    champions = {answer.id: answer for answer in build.prompts.get("incumbent", ())}
    regressions: list[Broken] = []
    breaks: list[Broken] = []
    for answer in ours:
        if answer.broken:
            before = champions.get(answer.id)
            (regressions if before and not before.broken else breaks).append(_broken(answer, before))
    repairs = [
        answer.id for answer in ours if not answer.broken and answer.id in champions and champions[answer.id].broken
    ]
    return Prompts(len(ours), bool(champions), tuple(regressions), tuple(breaks), tuple(repairs))


def _broken(ours: PromptResult, before: PromptResult | None) -> Broken:
    return Broken(ours.id, ours.prompt, ours.broken, ours.answer, before.answer if before else None)
