"""Records as tables in a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline import store
from pipeline.artifacts import Build, Interval, Verdict
from pipeline.errors import RegistryError
from pipeline.report import ledger as report_ledger
from pipeline.report import prompts, render

if TYPE_CHECKING:
    from pipeline.registry.versions import Version

COLOURS = {"pass": "green", "fail": "red", "inconclusive": "yellow"}
WIDTH_OF_A_PIPE = 140
ANSWER = 60  # characters of a broken prompt's answer


def read_build(key: str, version: Version | None = None) -> Build:
    """A finished build's record: from the store, or from the version's MLflow run where the store has none of its unit.

    Raises RegistryError when neither has it.
    """
    file = store.build_folder(key) / "build.json"
    if version is None:
        return Build.model_validate_json(file.read_text(encoding="utf-8"))
    if file.is_file():
        build = Build.model_validate_json(file.read_text(encoding="utf-8"))
        if build.unit == version.unit:
            return build
    from pipeline.registry import runs

    build = Build.model_validate_json(runs.read_text(version.run_id, runs.RECORD))
    if build.unit != version.unit:
        raise RegistryError(
            f"{runs.RECORD} of the MLflow run {version.run_id} is about unit {build.unit.digest[:12]}",
            key=f"{version.name} version {version.version}",
            allowed=f"unit {version.unit.digest[:12]}, which was registered",
            remedy="build anew: tunegate run CONFIG --again",
        )
    return build


def print_build(key: str, version: Version | None = None) -> None:
    """Print a finished build: must-pass prompts that broke, every system's scores, the loss ledger, the gate's table."""
    build = read_build(key, version)
    console = terminal()
    if verdicts := prompts.prompts(build):
        print_prompts(verdicts, console)
    head, *rows = render.scores_table(build)
    title = f"\n{build.name}: as served by vLLM {build.unit.vllm_version}, on the holdout"
    console.print(_table(head, [list(map(escape, row)) for row in rows], title=escape(title)))
    if ledger := report_ledger.ledger(build):
        head, *rows = render.ledger_table(ledger)
        title = f"loss ledger, {ledger.items} items: {ledger.said}"
        console.print(_table(head, [list(map(escape, row)) for row in rows], title=escape(title)))
    if build.verdict:
        print_verdict(build.verdict, console)


def print_prompts(verdicts: prompts.Prompts, console: Console) -> None:
    """Print how many must-pass prompts hold, and each broken one with its assertions; those since the champion first."""
    since = [(prompt, "since the champion") for prompt in verdicts.lost]
    before = [(prompt, "also before" if verdicts.with_champion else "broken") for prompt in verdicts.broken]
    rows = [
        [
            f"[red]{when}[/]",
            *(escape(_printable(text)) for text in (prompt.id, "; ".join(prompt.broken), prompt.answer[:ANSWER])),
        ]
        for prompt, when in [*since, *before]
    ]
    if rows:
        console.print(_table(["broken", "prompt", "assertion", "answer"], rows, title=escape(f"\n{verdicts.said}")))
    else:
        console.print(f"\n{verdicts.said}", highlight=False)


def print_verdict(verdict: Verdict, console: Console | None = None) -> None:
    """Print the gate's checks and its verdict."""
    rows = [
        [
            escape(check.name),
            escape(check.rule),
            interval(check.estimate),
            f"{check.outcome}, not counted" if check.waived else f"[{COLOURS[check.outcome]}]{check.outcome}[/]",
            escape(f"{check.why}; {check.waived}" if check.waived else check.why),
        ]
        for check in verdict.checks
    ]
    title = f"gate: [{COLOURS[verdict.outcome]}]{verdict.outcome}[/]"
    (console or terminal()).print(_table(["check", "rule", "measured", "outcome", "why"], rows, title=title))


def interval(estimate: Interval | None) -> str:
    """A point estimate and its interval, short."""
    return f"{estimate.value:.3g} ({estimate.low:.3g} to {estimate.high:.3g})" if estimate else "-"


def terminal() -> Console:
    """This terminal, or lines wide enough for a table where the output goes elsewhere."""
    console = Console()
    return console if console.is_terminal else Console(width=WIDTH_OF_A_PIPE)


def _printable(text: str) -> str:
    """A model's words in one line, without characters that steer the terminal."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def _table(head: list[str], rows: list[list[str]], title: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in head:
        table.add_column(escape(name), overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table
