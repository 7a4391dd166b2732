"""The demo's tickets: reproducible, labelled by what they say, and held-out ones truly unseen."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.data import demo_tickets

Ticket = tuple[str, dict[str, Any]]


def read(file: Path) -> list[Ticket]:
    rows = [json.loads(line)["messages"] for line in file.read_text(encoding="utf-8").splitlines()]
    assert all([message["role"] for message in row] == ["system", "user", "assistant"] for row in rows)
    return [(row[1]["content"], json.loads(row[2]["content"])) for row in rows]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return demo_tickets.write(tmp_path_factory.mktemp("tickets"), train=900, holdout=240, seed=42)


def shingles(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + 3]) for i in range(max(1, len(words) - 2))}


def test_the_command_writes_both_files_and_the_same_arguments_give_the_same_bytes(tmp_path: Path) -> None:
    """Two runs with one seed agree byte for byte, another seed differs, and a larger file starts alike."""
    for folder, seed, train in (("a", 1, 30), ("b", 1, 30), ("c", 2, 30), ("d", 1, 50)):
        sizes = ["--train", str(train), "--holdout", "10", "--seed", str(seed)]
        command = [sys.executable, "-m", "pipeline.data.demo_tickets", str(tmp_path / folder), *sizes]
        subprocess.run(command, check=True, capture_output=True)
    contents = {name: (tmp_path / name / "tickets-train.jsonl").read_bytes() for name in "abcd"}
    assert contents["a"] == contents["b"] != contents["c"]
    assert contents["d"].startswith(contents["a"])
    assert len(read(tmp_path / "a" / "tickets-holdout.jsonl")) == 10


def test_every_label_follows_from_the_text(files: tuple[Path, Path]) -> None:
    """One product is named, and the entities are all codes and addresses in the order they appear."""
    for file in files:
        for text, answer in read(file):
            assert [name for name in demo_tickets.PRODUCTS if name in text] == [answer["product"]]
            named = re.findall(r"INV-\d{3}|ORD-\d{3}|E\d{3}|[a-z]+@[a-z0-9.]+[a-z]", text)
            assert named == answer["entities"]
            assert list(answer) == ["category", "priority", "product", "entities"]


def test_every_category_and_priority_occurs_often(files: tuple[Path, Path]) -> None:
    """No label is rarer than half of what an even share would be, in either file."""
    for file in files:
        rows = read(file)
        for key, labels in (("category", demo_tickets.PROBLEMS), ("priority", demo_tickets.IMPACTS)):
            for label in labels:
                assert sum(answer[key] == label for _, answer in rows) > 0.5 * len(rows) / len(labels)


def test_holdout_tickets_are_unseen(files: tuple[Path, Path]) -> None:
    """No holdout ticket is near a training one, and they share no code, address or sender."""
    train, holdout = (read(file) for file in files)
    seen = [shingles(text) for text, _ in train]
    for text, _ in holdout:
        mine = shingles(text)
        assert max(len(mine & other) / len(mine | other) for other in seen) < 0.7
    for pattern in (r"(?:INV-|ORD-|E)\d{3}", r"\S+@\S+", r"\b(?:Thanks|Best|Regards), (\w+)"):
        assert not {*re.findall(pattern, str(train))} & {*re.findall(pattern, str(holdout))}


def test_sentences_do_not_name_their_label_in_another_category() -> None:
    """A problem sentence belongs to one category and an impact sentence to one priority."""
    for pool in (demo_tickets.PROBLEMS, demo_tickets.IMPACTS):
        sentences = [sentence for group in pool.values() for sentence in group]
        assert len(sentences) == len(set(sentences))
