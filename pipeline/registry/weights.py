"""The weights of a registered version: in the MLflow run's artifact folder, checked against what was judged.

They lie under their own digest, so that no other weights ever take their place. MLflow refuses a version whose
local source lies elsewhere, so a local folder gets hard links to the store's files; a remote one gets an upload,
and a machine that serves from it downloads once.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from pipeline import store
from pipeline.artifacts import Build
from pipeline.digests import digest_folder
from pipeline.errors import RegistryError
from pipeline.registry.client import artifact_uri, asking, local_folder

UNNAMED = "model"  # the one place in a run, before weights lay under their digest


def put(run_id: str, build: Build) -> tuple[str, str]:
    """Hard-link (or upload) the judged folder into the run; returns its place there and its digest.

    What lies there already as it was judged stays. Raises RegistryError when the folder is no longer what was judged.
    """
    judged = build.artifacts["quantize" if "quantize" in build.artifacts else "merge"].digest
    place = f"models/{judged}"
    local = local_folder(artifact_uri(run_id))
    if local:
        _link(build.model_path, local / place, judged)
    else:
        _must_be_as_judged(build.model_path, build.model_path, judged)
        with asking() as client:
            client.log_artifacts(run_id, str(build.model_path), place)
    return place, judged


def fetch(run_id: str, place: str, model_digest: str, label: str) -> Path:
    """The version's model folder on this machine, which lies at `place` in the run; `label` names the version in errors.

    Raises RegistryError when it is gone, or when what was downloaded hasn't the digest.
    """
    local = local_folder(artifact_uri(run_id))
    if local is None:
        return _downloaded(run_id, place, model_digest, label)
    if not (local / place).is_dir():
        raise RegistryError(
            f"the weights of {label} are not on this machine",
            file=str(local / place),
            remedy="restore them, or use the machine that built them",
        )
    return local / place


def _link(source: Path, target: Path, judged: str) -> None:
    """Put hard links to the files of `source` into `target`, checked and in one step; copies on another file system."""
    with store.lock(f"release/{judged}"):
        if target.is_dir() and digest_folder(target) == judged:
            return
        beside, damaged = (target.with_name(f".{target.name}.{what}") for what in ("partial", "damaged"))
        for left in (beside, damaged):
            shutil.rmtree(left, ignore_errors=True)
        _copy(source, beside)
        try:
            _must_be_as_judged(beside, source, judged)
        except RegistryError:
            shutil.rmtree(beside)
            raise
        if target.exists():
            target.rename(damaged)
        beside.rename(target)
        shutil.rmtree(damaged, ignore_errors=True)


def _must_be_as_judged(copy: Path, source: Path, judged: str) -> None:
    if digest_folder(copy) != judged:
        raise RegistryError(
            "the model folder changed since it was judged",
            file=str(source),
            remedy=f"delete {source.parent}, then tunegate run CONFIG",
        )


def _copy(source: Path, target: Path) -> None:
    def link(one: str, other: str) -> str:
        try:
            os.link(one, other)
        except OSError:  # another file system
            shutil.copy2(one, other)
        return other

    shutil.copytree(source, target, copy_function=link)


def _downloaded(run_id: str, place: str, model_digest: str, label: str) -> Path:
    target = store.home() / "work" / "releases" / model_digest
    with store.lock(f"release/{model_digest}"):
        if target.is_dir():
            return target
        beside = target.with_name(f".{target.name}.partial")
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        with asking() as client:
            found = Path(client.download_artifacts(run_id, place, str(beside)))
        digest = digest_folder(found)
        if digest != model_digest:
            raise RegistryError(
                f"what MLflow holds of {label} has the digest {digest[:12]}",
                allowed=f"{model_digest[:12]}, as it was judged",
                remedy="restore it, or build and approve anew",
            )
        found.rename(target)
        shutil.rmtree(beside)
    return target
