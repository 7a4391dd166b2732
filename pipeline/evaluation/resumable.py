"""Items of a stage program that survive a kill: appended to a file as they finish, read back by the next run of the same command.

Failed items aren't written, so the next run asks for them again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

from pipeline import files, program
from pipeline.artifacts import Item, Judgement
from pipeline.errors import ServingError

FAILURES_BEFORE_GIVING_UP = 20

T = TypeVar("T", Item, Judgement)


@dataclass
class Resumable(Generic[T]):
    """The items so far by id, those of a killed run among them, and by id why the others failed.

    `figures` gives the further figures of a progress line, `give_up` the error when nothing succeeds, from the number of failures
    and the last reason.
    """

    file: Path
    total: int
    figures: Callable[[Resumable[T]], dict[str, float]]
    give_up: Callable[[int, str], ServingError]
    items: dict[str, T] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def resume(self, kind: type[T], ids: Collection[str]) -> None:
        """Take in the items of these ids that a killed run finished."""
        lines = [kind.model_validate_json(line) for line in files.finished_lines(self.file)]
        self.items = {item.id: item for item in lines if item.id in ids}

    def keep(self, item: T) -> None:
        """Take a finished item in and append it to the file in one write."""
        self.items[item.id] = item
        with self.file.open("a", encoding="utf-8") as file:
            file.write(item.model_dump_json() + "\n")
        self._report()

    def fail(self, identity: str, reason: str) -> None:
        """Take in an item without an answer.

        Raises `give_up`'s error when the first FAILURES_BEFORE_GIVING_UP items, or all of fewer, failed.
        """
        self.failures[identity] = reason
        self._report()
        if not self.items and len(self.failures) >= min(self.total, FAILURES_BEFORE_GIVING_UP):
            raise self.give_up(len(self.failures), reason)

    def _report(self) -> None:
        program.progress(len(self.items) + len(self.failures), self.total, "items", **self.figures(self))
