"""The data report, to be read before training: report.json, report.md and two plots."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.data.splits import SPLITS
from pipeline.data.summary import Summary
from pipeline.files import write_json

SHOWN_WITH = ("pipeline.data.plots",)
WHY = {
    "defective": "defects, within data.max_defect_rate",
    "duplicate": "prompt and answer equal an earlier row's",
    "in_holdout": "the prompt is one of the holdout's",
    "too_long": "more tokens than data.sequence_len",
}


def write(summary: Summary, folder: Path) -> None:
    """Write report.json, report.md, token_lengths.png and, where answers are labels, answers.png."""
    from pipeline.data import plots

    write_json(folder / "report.json", summary)
    plot_files = plots.save(summary, folder)
    (folder / "report.md").write_text(markdown(summary, plot_files), encoding="utf-8")


def markdown(summary: Summary, plot_files: list[str]) -> str:
    """The text of report.md."""
    near, parts = summary["near_duplicates"], ["# Data report", ""]
    parts += _table(
        ["set", "rows", "tokens", "of them in answers", "median", "95 %", "99 %", "longest"],
        [
            [split, summary["rows"][split], *(summary["tokens"][split].get(name, "") for name in FIGURES)]
            for split in SPLITS
        ],
    )
    parts += [f"{summary['rows_read']} rows were read.", ""]
    parts += _table(["dropped", "rows", "why"], [[name, n, WHY[name]] for name, n in summary["dropped"].items()])
    parts += _table(["defect", "found"], [[name, n] for name, n in summary["defects"].items()])
    parts += _table(
        ["file", "set", "format", "rows", "ignored columns"],
        [
            [file["name"], file["set"], file["format"], file["rows"], ", ".join(file["ignored_columns"])]
            for file in summary["files"]
        ],
    )
    parts += [
        "## Rows that say the same",
        "",
        f"Near is at least {near['threshold']:.0%} of the word 3-grams in common.",
        f"Holdout rows near a row of another set: {near['holdout_near_train']}.",
        f"Holdout rows inside a longer row of another set: {summary['inside']['holdout_inside_train']}.",
        f"Training rows near an earlier one: {near['within_train']}.",
        f"Prompts with more than one answer: {summary['conflicting_prompts']}.",
        "",
    ]
    parts += _table(
        ["alike", "holdout", "set", "row"],
        [
            [f"{pair['similarity']:.0%}", _where(pair["first"]), pair["second"]["split"], _where(pair["second"])]
            for pair in near["first"]
        ],
    )
    parts += _table(["inside", "part", "holdout", *OVERLAP], [
        [f"{overlap['share']:.0%}", overlap["part"], *_overlap(overlap)] for overlap in summary["inside"]["first"]
    ])  # fmt: skip
    parts += _table(["prompt with more than one answer", "rows"], [
        [group[0]["text"][:80], ", ".join(f"{place['file']}:{place['line']}" for place in group)]
        for group in summary["conflicts"]
    ])  # fmt: skip
    parts += _benchmarks(summary["benchmarks"])
    for key, unseen in summary["unseen_labels"].items():
        parts += [f"Values of {key} in the holdout that train doesn't have: {', '.join(unseen)}.", ""]
    for key, values in summary["labels"].items():
        parts += [f"## Values of {key}", ""]
        parts += _table(["value", *SPLITS], [
            [value, *(splits.get(split, 0) for split in SPLITS)] for value, splits in sorted(values.items())
        ])  # fmt: skip
    parts += [line for plot in plot_files for line in (f"![{plot.removesuffix('.png')}]({plot})", "")]
    parts += ["## Examples", ""]
    for example in summary["examples"]:
        parts += ["```json", json.dumps(example, ensure_ascii=False, indent=1)[:2000], "```", ""]
    return "\n".join(parts)


def _benchmarks(benchmarks: Mapping[str, Any]) -> list[str]:
    if not benchmarks["files"]:
        return []
    return [
        "## Benchmarks",
        "",
        f"Documents found in train, val or calibration: {benchmarks['overlapping']} of {benchmarks['documents']}.",
        f"Too short to be looked for: {benchmarks['too_short']}.",
        "",
        *_table(
            ["file", "documents", "too short"],
            [[file["name"], file["documents"], file["too_short"]] for file in benchmarks["files"]],
        ),
        *_table(["document", *OVERLAP], [_overlap(overlap) for overlap in benchmarks["first"]]),
    ]


OVERLAP = ("set", "row", "shared")
FIGURES = ("total", "answers", "p50", "p95", "p99", "max")


def _where(place: Mapping[str, Any]) -> str:
    return f"{place['text'][:80]} ({Path(place['file']).name}:{place['line']})"


def _overlap(overlap: Mapping[str, Any]) -> list[str]:
    first, second = overlap["first"], overlap["second"]
    return [_where(first), second["split"], _where(second), overlap["shared"]]


def _table(head: list[str], rows: list[list[Any]]) -> list[str]:
    if not rows:
        return []
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *cells]] + [""]
