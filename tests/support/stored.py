"""All that lies in a test's store."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline import store
from pipeline.artifacts import Artifact


def all_artifacts() -> Iterator[Artifact]:
    """Every finished artefact in the store."""
    for file in sorted((store.home() / "work").glob("*/*/artifact.json")):
        if not file.parent.name.startswith("."):
            artifact = store.find(file.parent.parent.name, file.parent.name)
            if artifact is not None:
                yield artifact
