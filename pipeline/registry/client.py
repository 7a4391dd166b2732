"""The connection to MLflow: its address, its errors as RegistryErrors, and where a run's files lie.

The store is SQLite under mlruns/, or the server that MLFLOW_TRACKING_URI names. Only registry files use this.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urlparse

from pipeline import store
from pipeline.errors import Problem, RegistryError

SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GIT_PYTHON_REFRESH": "quiet",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    # its default of 7 tries keeps a user waiting 4 minutes for a server that is away
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    # weights go directly to the store behind the server, where that hands out signed addresses
    "MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
for _name, _setting in SETTINGS.items():
    os.environ.setdefault(_name, _setting)

import mlflow  # noqa: E402 - its telemetry reads the environment when it is imported
from mlflow.exceptions import MlflowException  # noqa: E402

AWAY = {"INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED"}


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, or the SQLite file under mlruns/."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{store.home() / 'mlflow.db'}"


def shown(text: str) -> str:
    """Text without the passwords of the addresses in it."""
    return re.sub(r"(\w+://)[^/\s@]+@", r"\1", text)


def is_new() -> bool:
    """Whether the first question will make the SQLite file, which takes some seconds."""
    uri = tracking_uri()
    return uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists()


@contextmanager
def asking() -> Iterator[mlflow.MlflowClient]:
    """A client to ask. An error of MLflow becomes a RegistryError: the server was away, or it refused."""
    try:
        yield _client(tracking_uri())
    except MlflowException as error:
        raise _problem(error, away=error.error_code in AWAY) from error
    except OSError as error:
        raise _problem(error, away=True) from error


@cache
def _client(uri: str) -> mlflow.MlflowClient:
    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    return mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)


def _problem(error: Exception, *, away: bool) -> RegistryError:
    where = shown(tracking_uri())
    cause = shown(str(error)).strip().splitlines()[0][:500] if str(error).strip() else type(error).__name__
    if away:
        return RegistryError(
            Problem(
                f"MLflow did not answer: {cause}",
                file=where,
                allowed="a reachable MLflow server or a SQLite file",
                remedy="check MLFLOW_TRACKING_URI, or unset it to use mlruns/mlflow.db",
            )
        )
    return RegistryError(
        Problem(
            f"MLflow refused: {cause}",
            file=where,
            remedy="look at the record in MLflow; tunegate up shows its page",
        )
    )


def artifact_uri(run_id: str) -> str:
    """The address of a run's files, as MLflow gives it."""
    with asking() as client:
        return str(client.get_run(run_id).info.artifact_uri)


def local_folder(uri: str) -> Path | None:
    """The folder that a URI names on this machine, or None for a remote store."""
    address = urlparse(uri)
    return Path(unquote(address.path)) if address.scheme in ("", "file") else None
