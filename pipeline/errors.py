"""How a run may fail: one error tree, each error a list of problems with their remedy.

TunegateError
├── ConfigError         a config file is wrong                       (exit 2)
├── DataError           a data file or its rows are wrong            (exit 2)
├── ModelError          a base model is unsafe, broken or unknown    (exit 2)
├── EnvironmentMissing  an interpreter or a package isn't there      (exit 2)
├── ResourceError       memory or disk doesn't suffice               (exit 3)
├── StageFailed         a stage program ended without a result       (exit 3)
├── ServingError        a server did not start, answer or stop       (exit 3)
├── RoutingError        the proxy could not be told or asked         (exit 3)
├── RegistryError       MLflow could not be told or asked            (exit 3)
├── GateFailed          the verdict is fail or inconclusive          (exit 4)
├── ReviewError         nothing approved, or an approval is void     (exit 5)
└── Busy                another run holds the lock                   (exit 6)

Imports nothing but the standard library: every environment raises these.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, where it is, and what to do about it.

    `file` and `line` (1-based) locate it; `key` is a config key or column. `what` describes it, `allowed` tells what is
    right, `remedy` is the next command or edit.
    """

    what: str
    file: str | None = None
    line: int | None = None
    key: str | None = None
    allowed: str | None = None
    remedy: str | None = None

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}" if self.file and self.line else self.file
        head = ": ".join(part for part in (where, self.key, self.what) if part)
        tail = [f"  allowed: {self.allowed}"] if self.allowed else []
        tail += [f"  remedy:  {self.remedy}"] if self.remedy else []
        return "\n".join([head, *tail])


class TunegateError(Exception):
    """An error that a user can act on; `problems` lists every problem, in file order."""

    exit_code = 1

    def __init__(self, problems: Problem | str | Iterable[Problem], **where: Any) -> None:
        if isinstance(problems, str):
            problems = Problem(problems, **where)
        self.problems: tuple[Problem, ...] = (problems,) if isinstance(problems, Problem) else tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))

    def to_json(self) -> dict[str, Any]:
        """The error as JSON, for the wire between a stage program and the flow."""
        return {"type": type(self).__name__, "problems": [asdict(problem) for problem in self.problems]}


class ConfigError(TunegateError):
    """A config file is wrong."""

    exit_code = 2


class DataError(TunegateError):
    """A data file or its rows are wrong."""

    exit_code = 2


class ModelError(TunegateError):
    """A base model is unsafe to load, broken, gated or unknown."""

    exit_code = 2


class EnvironmentMissing(TunegateError):
    """An interpreter or a package that a stage needs isn't there."""

    exit_code = 2


class ResourceError(TunegateError):
    """Memory or disk doesn't suffice; the remedy names the setting to change."""

    exit_code = 3


class StageFailed(TunegateError):
    """A stage program ended without a result; the problem names its log."""

    exit_code = 3


class ServingError(TunegateError):
    """A model server did not start, answer or stop."""

    exit_code = 3


class RoutingError(TunegateError):
    """The proxy could not be started, told or asked."""

    exit_code = 3


class RegistryError(TunegateError):
    """MLflow could not be told or asked."""

    exit_code = 3


class GateFailed(TunegateError):
    """The gate's verdict is fail or inconclusive; nothing was registered."""

    exit_code = 4


class ReviewError(TunegateError):
    """An approval is missing, or void because the served unit changed."""

    exit_code = 5


class Busy(TunegateError):
    """Another run holds the lock on this key, the GPU or the deployment."""

    exit_code = 6


def from_json(record: dict[str, Any]) -> TunegateError:
    """Rebuild an error that a stage program wrote; an unknown type becomes StageFailed."""
    kinds = {kind.__name__: kind for kind in TunegateError.__subclasses__()}
    problems = [Problem(**problem) for problem in record["problems"]]
    return kinds.get(record["type"], StageFailed)(problems)
