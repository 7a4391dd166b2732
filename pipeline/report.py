"""One renderer: a build as model card, HTML page, tables and plots, for MLflow, Prefect and the terminal.

What models and people wrote (prompts, answers, reasons, paths) is untrusted: HTML escapes it, Markdown
keeps it in code spans. Nothing rendered loads anything from elsewhere.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline import report_content as content
from pipeline import report_facts as facts
from pipeline import report_plots
from pipeline.artifacts import Build, Check, Verdict

CARD_LIMIT = 7900  # MLflow's longest note has 8000 characters
MARKS = {"pass": "✅ pass", "fail": "❌ fail", "inconclusive": "⚠️ inconclusive"}
HTML_EXAMPLES = 6

save_plots = report_plots.save_plots


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


def gate_table(verdict: Verdict) -> str:
    """The verdict and its checks in Markdown."""
    rows = [
        [MARKS[check.outcome], check.name, check.rule, content.with_interval(check.estimate), check.why]
        for check in verdict.checks
    ]
    table = markdown_table(["", "check", "rule", "measured", "why"], rows)
    return f"**{MARKS[verdict.outcome]}** for the served unit `{verdict.unit_digest[:12]}`\n\n{table}"


def model_card(build: Build) -> str:
    """The build in Markdown, at most CARD_LIMIT characters: examples give way first, then the digests."""
    for each, with_digests in ((3, True), (1, True), (0, True), (0, False)):
        card = "\n\n".join(_card(build, each, with_digests=with_digests)) + "\n"
        if len(card) <= CARD_LIMIT:
            return card
    return card[: CARD_LIMIT - 2] + "…\n"


def _card(build: Build, each: int, *, with_digests: bool) -> list[str]:
    level = f"{content.confidence(build):.0%}"
    parts = [f"# {build.name}", content.summary(build)]
    if build.verdict:
        parts += ["## Gate", gate_table(build.verdict)]
    head, *rows = scores_table(build)
    parts += [f"## Scores as served, with {level} intervals", markdown_table(head, rows)]
    moved = [
        f"- {delta.step}: {delta.metric} {content.with_interval(delta.change, sign=True)}"
        for delta in content.deltas(build)
    ]
    parts += ["\n".join(moved)] if moved else []
    load_head, *load = content.load_rows(build)
    parts += ["## Load, in milliseconds", markdown_table(load_head, load)] if load else []
    parts += ["## Model", _list(facts.model_facts(build))]
    parts += ["## Data", _list(facts.data_facts(build))]
    parts += ["## Training", _list(facts.training_facts(build))]
    shown = content.examples(build, each) if each else []
    parts += ["## Answers side by side", *map(_example, shown)] if shown else []
    parts += ["## What is served", _list(facts.serving_facts(build))]
    parts += ["## Digests", _list(facts.digests(build))] if with_digests else []
    steps = [f"    {command}  # {what}" for command, what in facts.next_steps(build)]
    parts += ["## Next", "\n".join(steps), "## Limits", "\n".join(f"- {note}" for note in facts.NOTES)]
    return parts


def _example(example: content.Example) -> str:
    lines = [
        f"**{content.EXAMPLE_ORDER[example.kind]}**: {code(example.prompt, 200)}",
        f"- expected {code(example.expected, 120)}",
    ]
    lines += [f"- {answer.role} ({answer.score:.2g}) {code(answer.text, 120)}" for answer in example.answers]
    return "\n".join([lines[0], "", *lines[1:]])


def _list(pairs: Sequence[tuple[str, str]]) -> str:
    return "\n".join(f"- {name}: {code(value, 300)}" for name, value in pairs) or "- nothing recorded"


def code(text: str, limit: int) -> str:
    """Untrusted text as one Markdown code span: one line of at most `limit` characters, backticks fenced."""
    line = " ".join(text.split())
    line = line if len(line) <= limit else line[: limit - 1] + "…"
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    pad = " " if line.startswith("`") or line.endswith("`") or not line else ""
    return f"{ticks}{pad}{line}{pad}{ticks}"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose cells can't break it."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines
    )


def html(build: Build) -> str:
    """The build as one self-contained page: no script, nothing loaded, everything escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template("report.html.j2").render(**_page(build))


def _page(build: Build) -> dict[str, Any]:
    """All that the template shows."""
    scores_head, *scores = scores_table(build)
    load_head, *load = content.load_rows(build)
    pictures = {
        name: "data:image/svg+xml;base64," + base64.b64encode(svg).decode()
        for name, svg in report_plots.svgs(build).items()
    }
    return {
        "build": build,
        "level": f"{content.confidence(build):.0%}",
        "summary": content.summary(build),
        "tiles": _tiles(build),
        "with_interval": content.with_interval,
        "scores_head": scores_head,
        "scores": scores,
        "deltas": content.deltas(build),
        "load_head": load_head,
        "load": load,
        "pictures": pictures,
        "loss": _loss(build),
        "kinds": content.EXAMPLE_ORDER,
        "shared": content.shared_prompt(build).removesuffix(content.USER_TURN),
        "examples": content.examples(build, HTML_EXAMPLES),
        "checks": _worst_first(build),
        "model": facts.model_facts(build),
        "data": facts.data_facts(build),
        "training": facts.training_facts(build),
        "serving": facts.serving_facts(build),
        "digests": facts.digests(build),
        "steps": facts.next_steps(build),
        "notes": facts.NOTES,
    }


def _worst_first(build: Build) -> list[Check]:
    """The gate's checks, what stands in the way before what holds."""
    order = ("fail", "inconclusive", "pass")
    return sorted(build.verdict.checks, key=lambda check: order.index(check.outcome)) if build.verdict else []


def _tiles(build: Build) -> list[tuple[str, str, str]]:
    """The figures to see first: (name, value, beneath)."""
    name, found = content.headline(build), content.evaluated(build)
    tiles = []
    if name and "candidate" in found and name in found["candidate"].metrics:
        interval = found["candidate"].metrics[name]
        tiles.append(
            (
                f"{name}, candidate",
                content.short(interval.value),
                f"{interval.low:.3f} to {interval.high:.3f}",
            )
        )
    tiles += [
        (delta.step, f"{delta.change.value:+.3f}", f"{delta.change.low:+.3f} to {delta.change.high:+.3f}")
        for delta in content.deltas(build)
    ]
    test = build.loadtests.get("candidate")
    if test and test.levels and test.levels[-1].completed:
        level = test.levels[-1]
        rate = sum(level.metrics["output_throughput"]) / len(level.metrics["output_throughput"])
        first = sum(level.metrics["p95_ttft_ms"]) / len(level.metrics["p95_ttft_ms"])
        tiles.append((f"tokens/s at {level.max_concurrency} users", f"{rate:,.0f}", f"first token p95 {first:,.0f} ms"))
    return tiles


def _loss(build: Build) -> str | None:
    """The loss curve that finetune left, if it is still there."""
    trained = build.artifacts.get("finetune")
    file = trained.extra / "loss.png" if trained else None
    if file is None or not file.is_file():
        return None
    return "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()
