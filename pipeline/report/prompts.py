"""Must-pass prompts in a report: those that broke since the champion, then those that are broken and were before."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.artifacts import Build, PromptResult


@dataclass(frozen=True)
class Broken:
    """A prompt that the candidate broke, what it broke, and the champion's answer where there is one."""

    id: str
    prompt: str
    broken: tuple[str, ...]
    answer: str
    champion: str | None


@dataclass(frozen=True)
class Prompts:
    """How many were asked, and the broken ones: `lost` passed by the champion, `broken` by nobody, `mended` by the candidate."""

    asked: int
    with_champion: bool
    lost: tuple[Broken, ...]
    broken: tuple[Broken, ...]
    mended: tuple[str, ...]

    @property
    def said(self) -> str:
        """The result in one sentence."""
        held = f"{self.asked - len(self.lost) - len(self.broken)} of {self.asked} must-pass prompts hold"
        if not self.with_champion:
            return f"{held}; there is no champion to compare with."
        counts = {"broken before": len(self.broken), "mended": len(self.mended)}
        parts = [f"{name}: {count}" for name, count in counts.items() if count]
        return f"{held}; {', '.join([f'broken since the champion: {len(self.lost)}', *parts])}."


def prompts(build: Build) -> Prompts | None:
    """What became of the must-pass prompts, or None where the candidate was asked none."""
    if not (ours := build.prompts.get("candidate", ())):
        return None
    champions = {result.id: result for result in build.prompts.get("incumbent", ())}
    lost: list[Broken] = []
    broken: list[Broken] = []
    for result in ours:
        if result.broken:
            before = champions.get(result.id)
            (lost if before and not before.broken else broken).append(_broken(result, before))
    mended = [
        result.id for result in ours if not result.broken and result.id in champions and champions[result.id].broken
    ]
    return Prompts(len(ours), bool(champions), tuple(lost), tuple(broken), tuple(mended))


def _broken(result: PromptResult, before: PromptResult | None) -> Broken:
    return Broken(result.id, result.prompt, result.broken, result.answer, before.answer if before else None)
