"""`tunegate demo`: the commands a user would type, typed in turn, on made-up support tickets and a small model.

Nothing here is a path of its own: it writes the demo's data, runs the same commands, and asks the proxy one question.
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
    """From base model to an answer through the proxy; a second time only the answer is new."""
    started = time.monotonic()
    folder = store.home() / "demo"
    if not (folder / "tickets-holdout.jsonl").is_file():
        demo_tickets.write(folder, **ROWS, seed=SEED)
    print(f"tickets: {folder}/tickets-train.jsonl and {folder}/tickets-holdout.jsonl")
    _typed("run", str(CONFIG), "--data-dir", str(folder))
    candidate = waiting(NAME)
    if candidate:
        _typed("approve", NAME, "--version", candidate.version, "--reviewer", options.reviewer, "--reason", "demo")
    _typed("promote", NAME)
    _ask(folder / "tickets-holdout.jsonl")
    print(
        f"\n{time.monotonic() - started:.0f} s. It serves until `make down`. Look around: make up, tunegate status, tunegate chat {NAME}"
    )
    return 0


def _typed(*arguments: str) -> None:
    """Show a command and run it; a command that fails ends the demo with its exit code."""
    print(f"\n$ tunegate {shlex.join(arguments)}", flush=True)
    try:
        cli.main(arguments)
    except SystemExit as ended:
        if ended.code:
            raise


def _ask(holdout: Path) -> None:
    """Send one held-out ticket through the proxy and print what came back beside what was expected."""
    live = promote.status(NAME)
    row = json.loads(random.choice(holdout.read_text(encoding="utf-8").splitlines()))  # noqa: S311 - any ticket will do
    *prompt, expected = row["messages"]
    began = time.monotonic()
    with chat.client(str(live.url), 120) as http:
        answer = chat.complete(http, NAME, prompt, max_tokens=128)
    print(f'\n$ curl {live.url}/v1/chat/completions -d \'{{"model": "{NAME}", "messages": […]}}\'')
    print(f"  ticket    {prompt[-1]['content']}")
    print(f"  answer    {answer.text}  ({time.monotonic() - began:.1f} s)")
    print(f"  expected  {expected['content']}")
