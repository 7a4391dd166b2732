"""One renderer: a build as HTML page, Markdown, JSON, tables and plots, for MLflow, Prefect, programs and the terminal.

All render `page.Page`. Texts by models and people (prompts, answers, reasons, paths) are untrusted: HTML escapes them,
Markdown keeps them in code spans. A rendered page loads nothing from elsewhere.
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
FOLDED = 320  # characters of an answer or a prompt before the rest is folded


def scores_table(build: Build) -> list[list[str]]:
    """Metrics by systems with intervals: the head, then a row a metric; plain text for the terminal."""
    systems = content.evaluated(build)
    head = ["metric", *(content.system_label(build, role) for role in systems)]
    rows = [
        [name, *(content.with_interval(system.metrics.get(name)) for system in systems.values())]
        for name in content.metric_names(build)
    ]
    counts = ["items", *(f"{len(system.items)}, {system.errors} failed" for system in systems.values())]
    return [head, *rows, counts]


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
    """The verdict and its checks in Markdown, blocking checks first."""
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
    """The build in Markdown, at most CARD_LIMIT characters: examples give way first, the facts for a decision last."""
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


def _sections(build: Build, report: Page) -> list[tuple[int, str]]:
    """The report's sections in Markdown, each with its rank: where room is short, the highest rank goes first."""
    level = f"{report.confidence:.0%}"
    head, *scores = scores_table(build)
    gate = f"## Gate\n\n{gate_table(build.verdict)}" if build.verdict else ""
    examples = content.examples(build, CARD_EXAMPLES)
    few = {kind: [example for example in examples if example.kind == kind] for kind in content.EXAMPLE_ORDER}
    return [
        (0, f"# {report.name}\n\n{plain(report.why)} {report.summary}"),
        (0, _prompts(report)),
        (0, gate),
        (2, _ledger(report)),
        (1, f"## Scores as served, with {level} intervals\n\n{markdown_table(head, scores)}"),
        (3, _deltas(report)),
        (5, _slices(report)),
        (3, _judges(report)),
        (3, _load(report)),
        (1, f"## Model\n\n{_list(report.model)}"),
        (4, f"## Data\n\n{_list(report.data)}"),
        (4, f"## Training\n\n{_list(report.training)}"),
        *_examples(few),
        (2, f"## What is served\n\n{_list(report.serving)}"),
        (6, f"## Digests\n\n{_list(report.digests)}"),
        (3, _costs(report)),
        (0, "## Next\n\n" + "\n".join(f"    {command}  # {effect}" for command, effect in report.next)),
        (1, "## Limits\n\n" + "\n".join(f"- {note}" for note in report.notes)),
    ]  # fmt: skip


def _deltas(report: Page) -> str:
    lines = (
        f"- {delta.step}: {delta.metric} {content.with_interval(delta.change, sign=True)}" for delta in report.deltas
    )
    return "\n".join(lines)


def _prompts(report: Page) -> str:
    if report.prompts is None:
        return ""
    parts = [f"## Must-pass prompts\n\n{report.prompts.said}"]
    titles = (
        ("Broken since the champion", report.prompts.lost),
        ("Broken, and not held before", report.prompts.broken),
    )
    for title, prompts in titles:
        lines = [
            f"- {code(prompt.id, 60)}: {'; '.join(code(part, 120) for part in prompt.broken)}" for prompt in prompts
        ]
        more = [f"- and {len(lines) - CARD_PROMPTS} more"] if len(lines) > CARD_PROMPTS else []
        parts += [f"**{title}**\n\n" + "\n".join([*lines[:CARD_PROMPTS], *more])] if lines else []
    return "\n\n".join(parts)


def _ledger(report: Page) -> str:
    if report.ledger is None:
        return ""
    head, *rows = ledger_table(report.ledger)
    title = f"## Loss ledger, {report.ledger.items} items"
    return f"{title}\n\n{report.ledger.said}\n\n{markdown_table(head, rows)}"


def _slices(report: Page) -> str:
    if report.slices is None:
        return ""
    rows = [
        [code(part.by, 40), code(part.value, 60), str(part.items), content.with_interval(part.score),
         content.with_interval(part.change, sign=True)]
        for part in report.slices.shown
    ]  # fmt: skip
    head = ["by", "value", "items", f"candidate's {report.slices.metric}", f"minus {report.slices.against or '-'}"]
    return f"## Slices\n\nThe extremes of {report.slices.found}.\n\n{markdown_table(head, rows)}"


def _judges(report: Page) -> str:
    parts = []
    if report.tasks:
        head = ["task", "metric", "documents", *content.ROLES, "change"]
        rows = [
            [code(task.task, 60), code(task.metric, 40), str(task.documents),
             *(content.with_interval(task.scores.get(role)) for role in content.ROLES),
             content.with_interval(task.change, sign=True)]
            for task in report.tasks
        ]  # fmt: skip
        parts.append(f"## lm-eval\n\n{markdown_table(head, rows)}")
    parts += [
        f"## LLM judge\n\nAgainst {judge.against}, by {code(judge.model, 80)}: win rate "
        f"{content.with_interval(judge.win_rate)}, both orders agree {content.with_interval(judge.agreement)}; of {judge.items} "
        f"items {judge.won} won and {judge.lost} lost in both orders, {judge.failed} not judged."
        for judge in report.judged
    ]
    return "\n\n".join(parts)


def _load(report: Page) -> str:
    if not report.load:
        return ""
    head, *rows = load.rows(report.load)
    return f"## Load, in milliseconds\n\n{markdown_table(head, rows)}"


def _costs(report: Page) -> str:
    if not report.costs:
        return ""
    rows = [
        [str(cost.users), content.with_interval(cost.tokens_per_second), content.with_interval(cost.cost),
         "yes" if cost.objective else ""]
        for cost in report.costs
    ]  # fmt: skip
    head = ["users", "output tokens/s", "cost of a million output tokens", "objective"]
    return f"## Cost\n\n{markdown_table(head, rows)}"


def _examples(by_kind: dict[content.Kind, list[content.Example]]) -> list[tuple[int, str]]:
    """The heading, and each example with its rank: the flips stay longest."""
    sections = [(7, "## Answers side by side")] if any(by_kind.values()) else []
    for rank, (kind, examples) in enumerate(by_kind.items(), start=7):
        sections += [(rank + place, _example(kind, example)) for place, example in enumerate(examples)]
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
    """Our own text that may quote others: the beginnings of tags, links, pictures and code are escaped."""
    return re.sub(r"<(?=[A-Za-z/!?])|[\[`]", r"\\\g<0>", text)


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose cells can't break it."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines
    )


def to_json(build: Build) -> str:
    """The build as JSON for programs: `page.Page`, intervals as {value, low, high}; numbers that aren't finite are null."""
    from pydantic_core import to_json as dumped

    return dumped(page(build), indent=1, inf_nan_mode="null").decode() + "\n"


def html(build: Build) -> str:
    """The build as one self-contained page: no script, nothing loaded, everything escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template("page.html.j2").render(**_template_values(build, page(build)))


def _template_values(build: Build, report: Page) -> dict[str, Any]:
    """The template's values."""
    scores_head, *scores = scores_table(build)
    pictures = {
        name: "data:image/svg+xml;base64," + base64.b64encode(svg).decode() for name, svg in plots.svgs(build).items()
    }
    return {
        "page": report,
        "level": f"{report.confidence:.0%}",
        "tiles": _tiles(build, report),
        "with_interval": content.with_interval,
        "scores_head": scores_head,
        "scores": scores,
        "ledger": ledger_table(report.ledger) if report.ledger else [],
        "roles": [role for role in content.ROLES if any(role in task.scores for task in report.tasks)],
        "load_head": load.HEAD,
        "figure": load.figure,
        "beneath": load.beneath,
        "failed": load.failed,
        "open_ends": any(metric.open_above for level in report.load for metric in level.metrics.values()),
        "pictures": pictures,
        "loss": _loss(build),
        "kinds": content.EXAMPLE_ORDER,
        "folded": FOLDED,
    }


def _tiles(build: Build, report: Page) -> list[tuple[str, str, str]]:
    """The headline figures: (name, value, beneath)."""
    name = content.headline(build)
    tiles = []
    if name and name in report.scores.get("candidate", {}):
        interval = report.scores["candidate"][name]
        beneath = f"{interval.low:.3f} to {interval.high:.3f}"
        tiles.append((f"{name}, candidate", content.short(interval.value), beneath))
    tiles += [
        (
            delta.step.partition(":")[0],
            f"{delta.change.value:+.3f}",
            f"{delta.change.low:+.3f} to {delta.change.high:+.3f}",
        )
        for delta in report.deltas
    ]
    ours = [level for level in report.load if level.system == "candidate" and level.metrics]
    if ours:
        rate, first = (ours[-1].metrics[name].interval.value for name in ("output_throughput", "p95_ttft_ms"))
        tiles.append((f"tokens/s at {_users(ours[-1].users)}", f"{rate:,.0f}", f"first token p95 {first:,.0f} ms"))
    tiles += [
        (f"a million tokens at {_users(cost.users)}", content.short(cost.cost.value), "at the load objective")
        for cost in report.costs
        if cost.objective
    ]
    return tiles


def _users(count: int) -> str:
    return "1 user" if count == 1 else f"{count} users"


def _loss(build: Build) -> str | None:
    """Training's loss curve, if its file exists."""
    artifact = build.artifacts.get("finetune")
    file = artifact.extra / "loss.png" if artifact else None
    if file is None or not file.is_file():
        return None
    return "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()
