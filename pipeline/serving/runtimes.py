"""Where vLLM runs: a table from `serve.runtime` to all that the rest of the pipeline asks of a runtime.

A new runtime is one file with the functions of `Operations`, its name in `artifacts.RuntimeName` and `ServeConfig.runtime`, and
one entry in RUNTIMES.
The table imports no runtime, so that `tunegate check` reads it on the standard library alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from pipeline.environments import interpreters
from pipeline.environments.interpreters import Environment

if TYPE_CHECKING:
    from pipeline.config.schema import ServeConfig
    from pipeline.serving.digests import Installed
    from pipeline.serving.server import Condition, Server, ToServe


class Operations(Protocol):
    """The functions of a runtime's file."""

    def identity(self, serve: ServeConfig, environment: Environment | None, /) -> Installed:
        """The digest of all that is installed beside vLLM, and vLLM's version; raises when vLLM isn't there."""

    def spawn(self, to_serve: ToServe, files: dict[str, str], /, *, keep: bool) -> Server:
        """Start the server and return at once.

        `files` are the digests of the model's files as they were judged. With `keep` the server outlives this process and is
        started again when it dies.
        """

    def stop(self, server: Server, timeout_s: float, /) -> None:
        """Let requests in flight finish for `timeout_s` seconds, then end the server; idempotent."""

    def is_alive(self, server: Server, /) -> bool:
        """Whether it runs or is being started again."""

    def condition(self, server: Server, /) -> Condition:
        """The server's condition, as the system knows it; never raises for a dead one."""

    def raise_if_dead(self, server: Server, /) -> None:
        """Raise ServingError with the log's telling line when the server ended before it was ready."""

    def refresh_log(self, server: Server, /) -> None:
        """Bring the server's log file up to date."""


@dataclass(frozen=True)
class Loadtest:
    """How vLLM's bench runs against a server of this runtime: a stage program, and the environment that runs it.

    `settings` are added to the program's request; they are made from the served unit's `runtime_digest` and the resolved
    section `serve`.
    """

    program: str
    environment: str
    settings: Callable[[str, Mapping[str, Any]], dict[str, Any]] = lambda _digest, _serve: {}


@dataclass(frozen=True)
class Runtime:
    """One entry of the table.

    `environment` names the environment that has vLLM, None where the runtime brings its own. `poll_s` is the pause between
    two looks at a starting server. `operations` imports the runtime's file when it is called.
    """

    operations: Callable[[], Operations]
    environment: str | None
    needs_container_engine: bool
    poll_s: float
    loadtest: Loadtest


def _process() -> Operations:
    from pipeline.serving import process

    return process


def _docker() -> Operations:
    from pipeline.serving import docker

    return docker


def _image(digest: str, serve: Mapping[str, Any]) -> dict[str, Any]:
    return {"image": digest, "container": serve["container"]}


RUNTIMES: dict[str, Runtime] = {
    "process": Runtime(
        operations=_process,
        environment="serve",
        needs_container_engine=False,
        poll_s=0.1,
        loadtest=Loadtest("pipeline.evaluation.loadtest", "serve"),
    ),
    "docker": Runtime(
        operations=_docker,
        environment=None,
        needs_container_engine=True,
        poll_s=1.0,  # each look asks the engine for the log
        loadtest=Loadtest("pipeline.evaluation.loadtest_container", "control", _image),
    ),
}


def environment_of(config: Mapping[str, Any]) -> Environment | None:
    """The environment that has vLLM for a resolved config; None for a runtime that brings its own.

    Raises EnvironmentMissing when it isn't there.
    """
    name = RUNTIMES[config["serve"]["runtime"]].environment
    return None if name is None else interpreters.find(name, interpreters.settings(config))
