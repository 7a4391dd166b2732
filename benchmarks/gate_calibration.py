"""How often the gate is right: simulated builds through `gate.judge`, as it is shipped.

    python benchmarks/gate_calibration.py [--simulations 2000] [--workers 2]

A candidate is compared with an incumbent whose true quality is known, with a margin of three points fixed first, at the size
that `sample_size.items_for_margin` recommends and at an eighth of it. What is asked for, at the recommended size: an equal
candidate passes at least 80 % of the time, one at the margin (three points worse) passes at most 5 % and fails, not merely
inconclusive, at least 80 %; an equal one fails at most 5 %. At an eighth of it: most verdicts are inconclusive, and wrong ones
stay as rare. Four kinds of holdout: right or wrong answers; scores in halves; right or wrong in groups of four that share a
part of their fate; and three metrics with eight slices looked at together. Two more that must not go wrong: a few large
groups, which look like many items, and one bad slice of eight, which the whole hides. Prints a table and exits with 1 where
one of these does not hold.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

from pipeline import gate, sample_size
from pipeline.artifacts import Evaluation, Item, Reports
from pipeline.config_gate import GateConfig, MetricCheck, SliceCheck

MARGIN = 0.03
CONFIDENCE = 0.95
UNIT = "0" * 64
GROUP, LARGE = 4, 50
SLICES = 8


@dataclass(frozen=True)
class Kind:
    """A kind of holdout: `variance` is that of the paired difference of an equal candidate, by independent item.

    `draw(rng, items, gap)` gives the candidate's and the incumbent's scores, (items, metrics) each, the candidate being better
    by `gap` on average.
    """

    name: str
    variance: float
    draw: Callable[[np.random.Generator, int, float], tuple[np.ndarray, np.ndarray]]
    policy: GateConfig
    asked: int = 1

    @property
    def recommended(self) -> int:
        """Items for an equal candidate to pass with sample_size.POWER."""
        return sample_size.items_for_margin(MARGIN, self.variance, CONFIDENCE, comparisons=self.asked)


def binary(rng: np.random.Generator, items: int, gap: float, discordance: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    """Right or wrong: on `discordance` of the items only one of the two is right."""
    kind = rng.choice(4, size=(items, 1), p=[0.7, 0.3 - discordance, (discordance + gap) / 2, (discordance - gap) / 2])
    return np.isin(kind, (0, 2)).astype(float), np.isin(kind, (0, 3)).astype(float)


def halves(rng: np.random.Generator, items: int, gap: float) -> tuple[np.ndarray, np.ndarray]:
    """Scores of 0, 0.5 and 1: a fifth of the items moves by half a point."""
    moved = rng.choice([0.0, 0.5, -0.5], size=(items, 1), p=[0.8, 0.1 + gap, 0.1 - gap])
    theirs = np.where(moved == 0, rng.choice([0.0, 0.5, 1.0], size=(items, 1)), 0.5)
    return theirs + moved, theirs


def grouped(
    rng: np.random.Generator, items: int, gap: float, group: int = GROUP, discordance: float = 0.1
) -> tuple[np.ndarray, np.ndarray]:
    """Right or wrong, in groups; half of the groups are all alike."""
    groups = -(-items // group)
    ours, theirs = binary(rng, groups * group, gap, discordance)
    alike = np.repeat(rng.random(groups) < 0.5, group)
    first = np.repeat(np.arange(groups) * group, group)
    ours[alike], theirs[alike] = ours[first[alike]], theirs[first[alike]]
    return ours[:items], theirs[:items]


def few_groups(rng: np.random.Generator, items: int, gap: float) -> tuple[np.ndarray, np.ndarray]:
    """Groups of LARGE items, and hardly an item that differs but for the gap."""
    return grouped(rng, items, gap, LARGE, max(0.01, abs(gap)))


def one_bad_slice(rng: np.random.Generator, items: int, gap: float) -> tuple[np.ndarray, np.ndarray]:
    """An equal candidate, but that one part of SLICES is worse by `gap`."""
    ours, theirs = binary(rng, items, 0.0)
    part = np.arange(items) % SLICES == 0
    ours[part], theirs[part] = binary(rng, int(part.sum()), gap, max(0.1, abs(gap)))
    return ours, theirs


def several(rng: np.random.Generator, items: int, gap: float) -> tuple[np.ndarray, np.ndarray]:
    """Three metrics, independent of each other."""
    drawn = [binary(rng, items, gap) for _ in range(3)]
    return np.hstack([ours for ours, _ in drawn]), np.hstack([theirs for _, theirs in drawn])


def policy(metrics: int = 1, **more: object) -> GateConfig:
    """Non-inferiority to the incumbent by MARGIN on each metric."""
    checks = tuple(MetricCheck(metric=f"m{number}", against="incumbent", margin=MARGIN) for number in range(metrics))
    return GateConfig.model_validate({"confidence": CONFIDENCE, "min_items": 1, "metrics": checks, **more})


# Half of the groups of four are alike: a design effect of 1 + 3/2.
KINDS = (
    Kind("right or wrong", 0.1, binary, policy()),
    Kind("scores in halves", 0.05, halves, policy()),
    Kind("groups of four", 0.25, grouped, policy(cluster_by="group")),
    Kind("20 groups of 50", 0.0, few_groups, policy(cluster_by="large")),
    Kind("one bad slice of 8", 0.1, one_bad_slice, policy(slices=(SliceCheck(by="slice", metric="m0"),))),
    Kind("3 metrics, 8 slices", 0.1, several, policy(3, slices=(SliceCheck(by="slice", metric="m0"),)), asked=3),
)


@cache
def items_of(scores: tuple[float, ...], number: int) -> Item:
    """An item with these scores; made once, as making it is most of a simulation."""
    columns = {"group": str(number // GROUP), "large": str(number // LARGE), "slice": str(number % SLICES)}
    named = {f"m{index}": score for index, score in enumerate(scores)}
    return Item(id=str(number), prompt="", expected="", answer="", finish_reason="stop", scores=named, columns=columns)


def evaluation(system: str, scores: np.ndarray) -> Evaluation:
    """A report of these scores."""
    items = tuple(items_of(tuple(row), number) for number, row in enumerate(scores.tolist()))
    return Evaluation.model_construct(
        system=system, unit_digest=UNIT, holdout_digest="h", metrics={}, items=items, errors=0, seconds=0.0
    )


def simulate(kind: str, size: int, gap: float, simulations: int, seed: int) -> Counter[str]:
    """Verdicts of so many builds."""
    chosen = next(one for one in KINDS if one.name == kind)
    rng, found = np.random.default_rng(seed), Counter[str]()
    for _ in range(simulations):
        ours, theirs = chosen.draw(rng, size, gap)
        both = {"candidate": evaluation("candidate", ours), "incumbent": evaluation("incumbent", theirs)}
        reports = Reports.model_construct(evaluations=both, loadtests={}, tasks={}, prompts={}, judged=())
        found[gate.judge(reports, chosen.policy, UNIT).outcome] += 1
    return found


@dataclass(frozen=True)
class Demand:
    """What is asked of a share of verdicts."""

    outcome: str
    at_least: float = 0.0
    at_most: float = 1.0

    def holds(self, share: float) -> bool:
        """Whether a share fulfils it."""
        return self.at_least <= share <= self.at_most

    def __str__(self) -> str:
        bound = f">= {self.at_least:.0%}" if self.at_least else f"<= {self.at_most:.0%}"
        return f"{self.outcome} {bound}"


# (is the size the recommended one, the true gap) → what is asked.
DEMANDS = {
    (True, 0.0): (Demand("pass", at_least=0.8), Demand("fail", at_most=0.05)),
    (True, -MARGIN): (Demand("pass", at_most=0.05), Demand("fail", at_least=0.8)),
    (False, 0.0): (Demand("inconclusive", at_least=0.5), Demand("fail", at_most=0.05)),
    (False, -MARGIN): (Demand("inconclusive", at_least=0.5), Demand("pass", at_most=0.05)),
}
# Lines of their own: kind, items, true gap, what is asked.
MORE = (
    ("20 groups of 50", 1000, -MARGIN, (Demand("pass", at_most=0.05),)),
    ("one bad slice of 8", 1600, -0.15, (Demand("fail", at_least=0.8), Demand("pass", at_most=0.1))),
    ("one bad slice of 8", 1600, 0.0, (Demand("pass", at_least=0.8), Demand("fail", at_most=0.05))),
)


def lines() -> Iterator[tuple[str, int, float, tuple[Demand, ...]]]:
    """Every line of the table: kind, items, true gap and what is asked."""
    alone = {name for name, *_ in MORE}
    for kind in KINDS:
        for (large, gap), demands in DEMANDS.items() if kind.name not in alone else ():
            yield kind.name, kind.recommended if large else kind.recommended // 8, gap, demands
    yield from MORE


def main() -> int:
    """Simulate every kind at both sizes and both gaps; 1 where a demand isn't met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--simulations", type=int, default=2000, help="builds for each line of the table")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    started, missed = time.monotonic(), 0
    print(f"margin {MARGIN:g}, confidence {CONFIDENCE:g}, {options.simulations} builds a line")
    print(f"{'holdout':<21}{'items':>6}{'true gap':>10}{'pass':>8}{'open':>8}{'fail':>8}  asked for")
    with ProcessPoolExecutor(options.workers) as pool:
        for name, size, gap, demands in lines():
            part = -(-options.simulations // options.workers)
            runs = [pool.submit(simulate, name, size, gap, part, seed) for seed in range(options.workers)]
            found = sum((run.result() for run in runs), Counter[str]())
            shares = {outcome: found[outcome] / found.total() for outcome in ("pass", "inconclusive", "fail")}
            unmet = [demand for demand in demands if not demand.holds(shares[demand.outcome])]
            missed += len(unmet)
            verdict = ", ".join(map(str, demands)) + (f"  NOT MET: {', '.join(map(str, unmet))}" if unmet else "")
            figures = "".join(f"{share:>8.1%}" for share in shares.values())
            print(f"{name:<21}{size:>6}{gap:>+10.2f}{figures}  {verdict}", flush=True)
    print(
        f"{'all demands are met' if not missed else f'{missed} demands are not met'}; {time.monotonic() - started:.0f} s"
    )
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
