"""What holds for every test: in CI a skip that isn't listed here is a failure."""

from __future__ import annotations

import os

import pytest

# The start of a test's id -> why CI may leave it out. Marks left out by `-m` are deselected, not skipped.
ALLOWED_SKIPS: dict[str, str] = {}

unlisted = pytest.StashKey[list[str]]()


def pytest_configure(config: pytest.Config) -> None:
    """Begin the list of skips that nobody allowed."""
    config.stash[unlisted] = []


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    """Note a test that was skipped without being listed."""
    outcome = yield
    report = outcome.get_result()
    if report.skipped and not hasattr(report, "wasxfail") and not item.nodeid.startswith(tuple(ALLOWED_SKIPS)):
        item.config.stash[unlisted].append(item.nodeid)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Refuse a file that skips itself whole (importorskip): its tests would vanish from every count."""
    if report.skipped and os.environ.get("CI"):
        pytest.exit(f"{report.nodeid} skips itself whole; skip its tests instead, and list them", returncode=1)


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Fail CI when something was skipped that the list doesn't name."""
    if os.environ.get("CI") and session.config.stash[unlisted] and exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say which skips failed the run."""
    if os.environ.get("CI") and config.stash[unlisted]:
        terminalreporter.section("skipped, and not in ALLOWED_SKIPS of tests/conftest.py")
        for nodeid in config.stash[unlisted]:
            terminalreporter.line(nodeid)
