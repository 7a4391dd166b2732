"""What holds for every test: in CI a skip that isn't listed here is a failure, and the longest files come first."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

# The start of a test's id -> why CI may leave it out. Marks left out by `-m` are deselected, not skipped.
ALLOWED_SKIPS: dict[str, str] = {"tests/end_to_end/test_old_home.py": "a shallow clone holds no history of version 0.1"}
# Two workers take a file at a time: a long one that is taken last leaves one of them idle.
LONGEST_FIRST = (
    "end_to_end/test_chain.py", "pipeline/data/test_prepare.py", "pipeline/finetune/test_train.py", "pipeline/model/test_gguf.py",
    "pipeline/quantize/test_awq.py", "pipeline/serving/test_vllm.py",
)  # fmt: skip


class Skips:
    """The skips that nobody allowed. With workers it listens where their reports come together."""

    def __init__(self) -> None:
        self.unlisted: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note a test that was skipped without being listed."""
        if report.skipped and not hasattr(report, "wasxfail") and not report.nodeid.startswith(tuple(ALLOWED_SKIPS)):
            self.unlisted.append(report.nodeid)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Note a file that skips itself whole (importorskip), listed or not: its tests would vanish from every count."""
        if report.skipped:
            self.unlisted.append(f"{report.nodeid} skips itself whole; skip its tests instead, and list them")

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """Fail when something was skipped that the list doesn't name."""
        if self.unlisted and exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Say which skips failed the run."""
        if self.unlisted:
            terminalreporter.section("skipped, and not in ALLOWED_SKIPS of tests/conftest.py")
            for nodeid in self.unlisted:
                terminalreporter.line(nodeid)


def pytest_configure(config: pytest.Config) -> None:
    """Watch the skips in CI, but not in a worker, which sees only its own; hear Ctrl-C.

    A shell starts what it puts into the background deaf to SIGINT, and tests of interruptions would wait for ever.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if os.environ.get("CI") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Skips(), "skips")


@pytest.fixture(autouse=True)
def _prefects_folder_stays() -> Iterator[None]:
    """A command run in this process names Prefect's folder for the whole process, and the next test has another home."""
    before = os.environ.get("PREFECT_HOME")
    yield
    if before is None:
        os.environ.pop("PREFECT_HOME", None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, the others in their order."""
    rank = {f"tests/{name}": place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: rank.get(item.nodeid.split("::")[0], len(rank)))
