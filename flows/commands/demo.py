"""`tunegate demo`: the commands of a user, typed in turn, on made-up support tickets and a small model.

It writes the demo's data, runs the same commands as a user, and asks the proxy one question.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import time
from pathlib import Path

from flows import cli
from flows.commands.review import waiting
from pipeline import chat, store
from pipeline.data import demo_tickets
from pipeline.deployment import promote

CONFIG = Path(__file__).parents[2] / "configs" / "demo.yaml"
NAME = "tickets"
ROWS = {"train": 800, "holdout": 240}
SEED = 42


def demo(options: argparse.Namespace) -> int:
    """From base model to an answer through the proxy; a second time only the answer is new.

    With `--data-only` the demo's data is written and nothing else happens.
    """
    began = time.monotonic()
    folder = _write_data()
    if options.data_only:
        print(f"next: tunegate run {CONFIG} --data-dir {folder}")
        return 0
    _typed("run", str(CONFIG), "--data-dir", str(folder))
    candidate = waiting(NAME)
    if candidate:
        _typed("approve", NAME, "--version", candidate.version, "--reviewer", options.reviewer, "--reason", "demo")
    _typed("promote", NAME)
    _ask(folder / "tickets-holdout.jsonl")
    print(
        f"\n{time.monotonic() - began:.0f} s. It serves until tunegate down."
        f" Look around: tunegate up, tunegate status, tunegate chat {NAME}"
    )
    return 0


def _write_data() -> Path:
    """Write the demo's tickets where they aren't yet; returns their folder."""
    folder = store.home() / "demo"
    if not (folder / "tickets-holdout.jsonl").is_file():
        demo_tickets.write(folder, **ROWS, seed=SEED)
    print(f"tickets: {folder}/tickets-train.jsonl and {folder}/tickets-holdout.jsonl")
    return folder


def _typed(*arguments: str) -> None:
    """Show a command and run it; a command that fails ends the demo with its exit code."""
    print(f"\n$ tunegate {shlex.join(arguments)}", flush=True)
    try:
        cli.main(arguments)
    except SystemExit as end:
        if end.code:
            raise


def _ask(holdout: Path) -> None:
    """Send one held-out ticket through the proxy and print the answer beside the expected one."""
    live = promote.status(NAME)
    row = json.loads(random.choice(holdout.read_text(encoding="utf-8").splitlines()))  # noqa: S311 - any ticket will do
    *prompt, reference = row["messages"]
    began = time.monotonic()
    with chat.client(str(live.url), 120) as http:
        answer = chat.complete(http, NAME, prompt, max_tokens=128)
    print(f'\n$ curl {live.url}/v1/chat/completions -d \'{{"model": "{NAME}", "messages": […]}}\'')
    print(f"  ticket    {prompt[-1]['content']}")
    print(f"  answer    {answer.text}  ({time.monotonic() - began:.1f} s)")
    print(f"  expected  {reference['content']}")
