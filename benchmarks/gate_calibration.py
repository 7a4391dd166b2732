"""How often the gate is right: simulated builds through `gate.judge`, as it is shipped.

    python benchmarks/gate_calibration.py [--simulations 2000] [--workers 2]

A candidate is compared with an incumbent whose true quality is known, with a margin of three points fixed first, at the size
that `sample_size.items_for_margin` recommends and at an eighth of it. Demanded at the recommended size: an equal
candidate passes at least 80 % of the time, one at the margin (three points worse) passes at most 5 % and fails, not merely
inconclusive, at least 80 %; an equal one fails at most 5 %. At an eighth of it: most verdicts are inconclusive, and wrong ones
stay as rare. Four kinds of holdout: right or wrong answers; scores in halves; right or wrong in groups of four that share a
part of their fate; and three metrics with eight slices looked at together. More that must not go wrong: a few large
groups, which look like many items; one bad slice of eight, which the whole hides; and candidates exactly on the edge, which may
pass in 2.5 % of builds (3.5 % here, for what 2,000 builds vary by): graded scores of which a few are lost wholly and more a
little, groups of unequal size, macro-F1 of few mistakes. Beside them what is truly fine and should still pass. Prints a table
and exits with 1 where one of these does not hold.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

from pipeline.artifacts import Evaluation, Item, Reports
from pipeline.config.gate import GateConfig, MetricCheck, SliceCheck
from pipeline.gate import gate
from pipeline.intervals import sample_size

MARGIN = 0.03
CONFIDENCE = 0.95
UNIT = "0" * 64
GROUP, LARGE = 4, 50
UNEVEN = {
    "one large": [800] + [8] * 29,
    "zipf": [round(300 / rank) for rank in range(1, 31)],
    "mixed": [5] * 30 + [35] * 30,
}
STARTS = {name: np.cumsum(sizes) for name, sizes in UNEVEN.items()}
LOST = 0.02  # share of answers that `rare_losses` loses wholly
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


def rare_losses(rng: np.random.Generator, items: int, gap: float) -> tuple[np.ndarray, np.ndarray]:
    """Full marks, but LOST less `gap` of the answers are lost wholly, and a fifth by a hundredth."""
    lost = LOST - gap
    return rng.choice([0.0, 0.99, 1.0], size=(items, 1), p=[lost, 0.2, 0.8 - lost]), np.ones((items, 1))


def overlap(rng: np.random.Generator, items: int, gap: float) -> tuple[np.ndarray, np.ndarray]:
    """Scores as token_f1's: beta distributed, of mean 0.75 + `gap` and standard deviation 0.25."""
    mean = 0.75 + gap
    spread = mean * (1 - mean) / 0.25**2 - 1
    return rng.beta(mean * spread, (1 - mean) * spread, size=(items, 1)), np.ones((items, 1))


def small_changes(rng: np.random.Generator, items: int, gap: float) -> tuple[np.ndarray, np.ndarray]:
    """Graded scores that differ by a tenth or so on every item, the candidate's being worse by MARGIN less `gap`."""
    theirs = rng.uniform(0.3, 0.7, size=(items, 1))
    return theirs + rng.uniform(-0.2, 0.2, size=(items, 1)) - MARGIN + gap, theirs


def uneven(rng: np.random.Generator, items: int, gap: float, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Right or wrong, each group of UNEVEN having a share of right answers of its own, 0.8 + `gap` on average."""
    mean = 0.8 + gap
    share = rng.beta(8 * mean, 8 * (1 - mean), size=len(UNEVEN[kind]))
    ours = rng.random(items) < np.repeat(share, UNEVEN[kind])
    return ours.astype(float)[:, None], np.ones((items, 1))


def two_labels(rng: np.random.Generator, items: int, gap: float) -> tuple[np.ndarray, np.ndarray]:
    """Expected and answered labels, of two alike in size: MARGIN less `gap` of the candidate's are wrong, none of the other's."""
    expected = np.array(["a", "b"])[np.arange(items) % 2]
    wrong = rng.random(items) < MARGIN - gap
    answers = np.where(wrong, np.where(expected == "a", "b", "a"), expected)
    return np.stack((expected, answers), axis=1), np.stack((expected, expected), axis=1)


def floor(least: float, **more: object) -> GateConfig:
    """One floor."""
    checks = (MetricCheck(metric="m0", min=least),)
    return GateConfig.model_validate({"confidence": CONFIDENCE, "min_items": 1, "metrics": checks, **more})


def against(margin: float, metric: str = "m0") -> GateConfig:
    """Non-inferiority by a margin just below a loss of `margin`."""
    checks = (MetricCheck(metric=metric, against="incumbent", margin=margin - 1e-9),)
    return GateConfig.model_validate({"confidence": CONFIDENCE, "min_items": 1, "metrics": checks})


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
    Kind("rare losses, floor", 0.0, rare_losses, floor(1 - LOST - 0.002 + 1e-9)),
    Kind("rare losses, gap", 0.0, rare_losses, against(LOST + 0.002)),
    Kind("token_f1, floor", 0.0, overlap, floor(0.75)),
    Kind("small changes, gap", 0.0, small_changes, against(MARGIN)),
    *(Kind(f"uneven, {name}", 0.0, partial(uneven, kind=name), floor(0.8, cluster_by=name)) for name in UNEVEN),
    Kind("f1_macro, gap", 0.0, two_labels, against(MARGIN, "f1_macro")),
)


@cache
def items_of(scores: tuple[float, ...], number: int) -> Item:
    """An item with these scores; made once, as making it is most of a simulation."""
    columns = {"group": str(number // GROUP), "large": str(number // LARGE), "slice": str(number % SLICES)}
    columns |= {name: str(np.searchsorted(starts, number, side="right")) for name, starts in STARTS.items()}
    named = {f"m{index}": score for index, score in enumerate(scores)}
    return Item(id=str(number), prompt="", expected="", answer="", finish_reason="stop", scores=named, columns=columns)


@cache
def labelled(expected: str, answer: str, number: int) -> Item:
    """An item with these labels."""
    scores = {"accuracy": float(expected == answer)}
    return Item(id=str(number), prompt="", expected=expected, answer=answer, finish_reason="stop", scores=scores)


def evaluation(system: str, scores: np.ndarray) -> Evaluation:
    """A report of these scores, or of these labels."""
    rows = enumerate(scores.tolist())
    items = tuple(labelled(*row, n) if scores.dtype.kind == "U" else items_of(tuple(row), n) for n, row in rows)
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
        found[gate.verdict_of(reports, chosen.policy, UNIT).outcome] += 1
    return found


@dataclass(frozen=True)
class Demand:
    """A bound on the share of verdicts."""

    outcome: str
    at_least: float = 0.0
    at_most: float = 1.0

    def holds(self, share: float) -> bool:
        """Whether a share fulfils it."""
        return self.at_least <= share <= self.at_most

    def __str__(self) -> str:
        bound = f">= {100 * self.at_least:g}%" if self.at_least else f"<= {100 * self.at_most:g}%"
        return f"{self.outcome} {bound}"


# (is the size the recommended one, the true gap) → what is asked.
DEMANDS = {
    (True, 0.0): (Demand("pass", at_least=0.8), Demand("fail", at_most=0.05)),
    (True, -MARGIN): (Demand("pass", at_most=0.05), Demand("fail", at_least=0.8)),
    (False, 0.0): (Demand("inconclusive", at_least=0.5), Demand("fail", at_most=0.05)),
    (False, -MARGIN): (Demand("inconclusive", at_least=0.5), Demand("pass", at_most=0.05)),
}
ON_THE_EDGE = (Demand("pass", at_most=0.035),)
FINE = (Demand("pass", at_least=0.7), Demand("fail", at_most=0.05))
# Lines of their own: kind, items, true gap, what is asked. Worse by less than the margin may be shown to be worse: FINE[:1].
MORE = (
    ("20 groups of 50", 1000, -MARGIN, (Demand("pass", at_most=0.05),)),
    ("one bad slice of 8", 1600, -0.15, (Demand("fail", at_least=0.8), Demand("pass", at_most=0.1))),
    ("one bad slice of 8", 1600, 0.0, (Demand("pass", at_least=0.8), Demand("fail", at_most=0.05))),
    ("rare losses, floor", 100, 0.0, ON_THE_EDGE),
    ("rare losses, floor", 200, 0.0, ON_THE_EDGE),
    ("rare losses, gap", 100, 0.0, ON_THE_EDGE),
    ("rare losses, gap", 600, 0.015, FINE[:1]),
    ("token_f1, floor", 240, 0.0, ON_THE_EDGE),
    ("token_f1, floor", 240, 0.05, FINE),
    ("small changes, gap", 240, 0.0, ON_THE_EDGE),
    ("small changes, gap", 240, MARGIN, FINE),
    ("uneven, one large", 1032, 0.0, ON_THE_EDGE),
    ("uneven, zipf", sum(UNEVEN["zipf"]), 0.0, ON_THE_EDGE),
    ("uneven, mixed", 1200, 0.0, ON_THE_EDGE),
    ("uneven, mixed", 1200, 0.1, FINE),
    ("f1_macro, gap", 100, 0.0, ON_THE_EDGE),
    ("f1_macro, gap", 200, 0.0, ON_THE_EDGE),
    ("f1_macro, gap", 400, 0.02, FINE[:1]),
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
