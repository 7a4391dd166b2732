"""One renderer: a build as HTML page, Markdown, JSON, tables and plots, for MLflow, Prefect, programs and the terminal.

All say what `report_page.Page` says. What models and people wrote (prompts, answers, reasons, paths) is untrusted: HTML
escapes it, Markdown keeps it in code spans. Nothing rendered loads anything from elsewhere.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.artifacts import Build, Verdict
from pipeline.report import content, load, plots
from pipeline.report import gate as report_gate
from pipeline.report import ledger as report_ledger
from pipeline.report.page import Facts, Page, page

CARD_LIMIT = 7900  # MLflow's longest note has 8000 characters
CARD_EXAMPLES = 8
CARD_PROMPTS = 5
MARKS = {"pass": "✅ pass", "fail": "❌ fail", "inconclusive": "⚠️ inconclusive"}
FOLDED = 320  # characters of an answer or a prompt that are shown before the rest is folded

save_plots = plots.save_plots


def scores_table(build: Build) -> list[list[str]]:
    """Metrics by systems with intervals: the head, then a row a metric; plain text for the terminal."""
    systems = content.evaluated(build)
    head = ["metric", *(content.system_label(build, role) for role in systems)]
    rows = [
        [name, *(content.with_interval(found.metrics.get(name)) for found in systems.values())]
        for name in content.metric_names(build)
    ]
    counted = ["items", *(f"{len(found.items)}, {found.errors} failed" for found in systems.values())]
    return [head, *rows, counted]


def ledger_table(ledger: report_ledger.Ledger) -> list[list[str]]:
    """The loss ledger: the head, then a row a step; plain text."""
    head = ["step", "engine", ledger.metric, "change to the step before"]
    rows = [
        [
            step.title + ("" if step.taken else " (not taken)"),
            step.engine,
            content.with_interval(step.score),
            content.with_interval(step.change, sign=True),
        ]
        for step in ledger.steps
    ]
    return [head, *rows]


def gate_table(verdict: Verdict) -> str:
    """The verdict and its checks in Markdown, what stands in the way first."""
    rows = [
        [
            f"{MARKS[check.outcome]}, not counted" if check.waived else MARKS[check.outcome],
            plain(check.name),
            plain(check.rule),
            content.with_interval(check.estimate),
            plain(check.why) + (f"; {code(check.waived, 200)}" if check.waived else ""),
        ]
        for check in report_gate.checks(verdict)
    ]
    table = markdown_table(["", "check", "rule", "measured", "why"], rows)
    return f"**{MARKS[verdict.outcome]}** for the served unit `{verdict.unit_digest[:12]}`\n\n{table}"


def markdown(build: Build) -> str:
    """The whole build in Markdown."""
    return _joined(_sections(build, page(build)))


def model_card(build: Build) -> str:
    """The build in Markdown, at most CARD_LIMIT characters: examples give way first, what one must know to decide last."""
    sections = _sections(build, page(build))
    for rank in sorted({rank for rank, _ in sections}, reverse=True):
        card = _joined(sections)
        if len(card) <= CARD_LIMIT:
            return card
        sections = [section for section in sections if section[0] < rank]
    card = _joined(sections)
    return card if len(card) <= CARD_LIMIT else card[: CARD_LIMIT - 2] + "…\n"


def _joined(sections: Sequence[tuple[int, str]]) -> str:
    return "\n\n".join(text for _, text in sections if text) + "\n"


def _sections(build: Build, found: Page) -> list[tuple[int, str]]:
    """The report's sections in Markdown, each with its rank: where room is short, the highest rank goes first."""
    level = f"{found.confidence:.0%}"
    head, *scores = scores_table(build)
    gate = f"## Gate\n\n{gate_table(build.verdict)}" if build.verdict else ""
    shown = content.examples(build, CARD_EXAMPLES)
    few = {kind: [one for one in shown if one.kind == kind] for kind in content.EXAMPLE_ORDER}
    return [
        (0, f"# {found.name}\n\n{plain(found.why)} {found.summary}"),
        (0, _prompts(found)),
        (0, gate),
        (2, _ledger(found)),
        (1, f"## Scores as served, with {level} intervals\n\n{markdown_table(head, scores)}"),
        (3, "\n".join(f"- {one.step}: {one.metric} {content.with_interval(one.change, sign=True)}" for one in found.deltas)),
        (5, _slices(found)),
        (3, _judges(found)),
        (3, _load(found)),
        (1, f"## Model\n\n{_list(found.model)}"),
        (4, f"## Data\n\n{_list(found.data)}"),
        (4, f"## Training\n\n{_list(found.training)}"),
        *_examples(few),
        (2, f"## What is served\n\n{_list(found.serving)}"),
        (6, f"## Digests\n\n{_list(found.digests)}"),
        (3, _costs(found)),
        (0, "## Next\n\n" + "\n".join(f"    {command}  # {what}" for command, what in found.next)),
        (1, "## Limits\n\n" + "\n".join(f"- {note}" for note in found.notes)),
    ]  # fmt: skip


def _prompts(found: Page) -> str:
    if found.prompts is None:
        return ""
    parts = [f"## Must-pass prompts\n\n{found.prompts.said}"]
    titles = (("Broken since the champion", found.prompts.lost), ("Broken, and not held before", found.prompts.broken))
    for title, broken in titles:
        lines = [f"- {code(one.id, 60)}: {'; '.join(code(part, 120) for part in one.broken)}" for one in broken]
        more = [f"- and {len(lines) - CARD_PROMPTS} more"] if len(lines) > CARD_PROMPTS else []
        parts += [f"**{title}**\n\n" + "\n".join([*lines[:CARD_PROMPTS], *more])] if lines else []
    return "\n\n".join(parts)


def _ledger(found: Page) -> str:
    if found.ledger is None:
        return ""
    head, *rows = ledger_table(found.ledger)
    title = f"## Loss ledger, {found.ledger.items} items"
    return f"{title}\n\n{found.ledger.said}\n\n{markdown_table(head, rows)}"


def _slices(found: Page) -> str:
    if found.slices is None:
        return ""
    rows = [
        [code(one.by, 40), code(one.value, 60), str(one.items), content.with_interval(one.score),
         content.with_interval(one.change, sign=True)]
        for one in found.slices.shown
    ]  # fmt: skip
    head = ["by", "value", "items", f"candidate's {found.slices.metric}", f"minus {found.slices.against or '-'}"]
    return f"## Slices\n\nThe extremes of {found.slices.found}.\n\n{markdown_table(head, rows)}"


def _judges(found: Page) -> str:
    parts = []
    if found.tasks:
        head = ["task", "metric", "documents", *content.ROLES, "change"]
        rows = [
            [code(one.task, 60), code(one.metric, 40), str(one.documents),
             *(content.with_interval(one.scores.get(role)) for role in content.ROLES),
             content.with_interval(one.change, sign=True)]
            for one in found.tasks
        ]  # fmt: skip
        parts.append(f"## lm-eval\n\n{markdown_table(head, rows)}")
    parts += [
        f"## LLM judge\n\nAgainst {one.against}, by {code(one.model, 80)}: win rate "
        f"{content.with_interval(one.win_rate)}, both orders agree {content.with_interval(one.agreement)}; of {one.items} "
        f"items {one.won} won and {one.lost} lost in both orders, {one.failed} not judged."
        for one in found.judged
    ]
    return "\n\n".join(parts)


def _load(found: Page) -> str:
    if not found.load:
        return ""
    head, *rows = load.rows(found.load)
    return f"## Load, in milliseconds\n\n{markdown_table(head, rows)}"


def _costs(found: Page) -> str:
    if not found.costs:
        return ""
    rows = [
        [str(one.users), content.with_interval(one.tokens_per_second), content.with_interval(one.cost),
         "yes" if one.objective else ""]
        for one in found.costs
    ]  # fmt: skip
    head = ["users", "output tokens/s", "cost of a million output tokens", "objective"]
    return f"## Cost\n\n{markdown_table(head, rows)}"


def _examples(shown: dict[content.Kind, list[content.Example]]) -> list[tuple[int, str]]:
    """The heading, and each example with its rank: the flips stay longest."""
    sections = [(7, "## Answers side by side")] if any(shown.values()) else []
    for rank, (kind, examples) in enumerate(shown.items(), start=7):
        sections += [(rank + place, _example(kind, one)) for place, one in enumerate(examples)]
    return sections


def _example(kind: content.Kind, example: content.Example) -> str:
    lines = [
        f"**{content.EXAMPLE_ORDER[kind]}**: {code(example.prompt, 200)}",
        "",
        f"- expected {code(example.expected, 120)}",
    ]
    return "\n".join(
        [*lines, *(f"- {answer.role} ({answer.score:.2g}) {code(answer.text, 120)}" for answer in example.answers)]
    )


def _list(pairs: Facts) -> str:
    return "\n".join(f"- {name}: {code(value, 300)}" for name, value in pairs) or "- nothing recorded"


def code(text: str, limit: int) -> str:
    """Untrusted text as one Markdown code span: one line of at most `limit` characters, backticks fenced."""
    line = " ".join(text.split())
    line = line if len(line) <= limit else line[: limit - 1] + "…"
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    pad = " " if line.startswith("`") or line.endswith("`") or not line else ""
    return f"{ticks}{pad}{line}{pad}{ticks}"


def plain(text: str) -> str:
    """Text of our own that may quote somebody's words: what would begin a tag, a link, a picture or code is escaped."""
    return re.sub(r"<(?=[A-Za-z/!?])|[\[`]", r"\\\g<0>", text)


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose cells can't break it."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines
    )


def to_json(build: Build) -> str:
    """The build as JSON for programs: `report_page.Page`, intervals as {value, low, high}; what isn't finite is null."""
    from pydantic_core import to_json as dumped

    return dumped(page(build), indent=1, inf_nan_mode="null").decode() + "\n"


def html(build: Build) -> str:
    """The build as one self-contained page: no script, nothing loaded, everything escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template("page.html.j2").render(**_shown(build, page(build)))


def _shown(build: Build, found: Page) -> dict[str, Any]:
    """All that the template shows."""
    scores_head, *scores = scores_table(build)
    pictures = {
        name: "data:image/svg+xml;base64," + base64.b64encode(svg).decode() for name, svg in plots.svgs(build).items()
    }
    return {
        "page": found,
        "level": f"{found.confidence:.0%}",
        "tiles": _tiles(build, found),
        "with_interval": content.with_interval,
        "scores_head": scores_head,
        "scores": scores,
        "ledger": ledger_table(found.ledger) if found.ledger else [],
        "roles": [role for role in content.ROLES if any(role in task.scores for task in found.tasks)],
        "load_head": load.HEAD,
        "figure": load.figure,
        "beneath": load.beneath,
        "failed": load.failed,
        "open_ends": any(one.open_above for level in found.load for one in level.metrics.values()),
        "pictures": pictures,
        "loss": _loss(build),
        "kinds": content.EXAMPLE_ORDER,
        "folded": FOLDED,
    }


def _tiles(build: Build, found: Page) -> list[tuple[str, str, str]]:
    """The figures to see first: (name, value, beneath)."""
    name = content.headline(build)
    tiles = []
    if name and name in found.scores.get("candidate", {}):
        interval = found.scores["candidate"][name]
        beneath = f"{interval.low:.3f} to {interval.high:.3f}"
        tiles.append((f"{name}, candidate", content.short(interval.value), beneath))
    tiles += [
        (
            delta.step.partition(":")[0],
            f"{delta.change.value:+.3f}",
            f"{delta.change.low:+.3f} to {delta.change.high:+.3f}",
        )
        for delta in found.deltas
    ]
    ours = [level for level in found.load if level.system == "candidate" and level.metrics]
    if ours:
        rate, first = (ours[-1].metrics[name].interval.value for name in ("output_throughput", "p95_ttft_ms"))
        tiles.append((f"tokens/s at {_users(ours[-1].users)}", f"{rate:,.0f}", f"first token p95 {first:,.0f} ms"))
    tiles += [
        (f"a million tokens at {_users(cost.users)}", content.short(cost.cost.value), "at the load objective")
        for cost in found.costs
        if cost.objective
    ]
    return tiles


def _users(count: int) -> str:
    return "1 user" if count == 1 else f"{count} users"


def _loss(build: Build) -> str | None:
    """The loss curve that finetune left, if it is still there."""
    trained = build.artifacts.get("finetune")
    file = trained.extra / "loss.png" if trained else None
    if file is None or not file.is_file():
        return None
    return "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()
