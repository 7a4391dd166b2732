"""The environment that every command sets before Prefect and MLflow read it; the user's own settings win.

Both read it when they are imported, and both would report their use to their makers.
"""

from __future__ import annotations

import os

from pipeline import store

# Nothing leaves the machine, and the pages show no advertisements.
QUIET = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "GIT_PYTHON_REFRESH": "quiet",
}
# A terminal shows tunegate's own lines, and of Prefect's and MLflow's only warnings or errors.
TERMINAL = {
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "PREFECT_LOGGING_LEVEL": "WARNING",
    "PREFECT_SERVER_LOGGING_LEVEL": "ERROR",
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
}


def set_environment() -> None:
    """Prefect's and MLflow's settings for a command: no telemetry, quiet, Prefect's files in our folder."""
    for name, setting in {**QUIET, **TERMINAL, "PREFECT_HOME": str(store.home() / "prefect")}.items():
        os.environ.setdefault(name, setting)
