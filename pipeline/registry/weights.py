"""The weights of a registered version: in the MLflow run's artifact folder, with the digest that was judged.

They lie under their own digest, so that other weights never take their place. MLflow refuses a version whose local source
lies elsewhere. So a local folder gets hard links to the store's files. A remote one gets an upload, and a machine that serves
from it downloads once.
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

UNNAMED = "model"  # the place of versions that were registered before weights lay under their digest


def put(run_id: str, build: Build) -> tuple[str, str]:
    """Hard-link (or upload) the judged folder into the run; returns its place there and its digest.

    A folder that lies there already with this digest stays. Raises RegistryError when the folder changed since it was judged.
    """
    digest = build.artifacts["quantize" if "quantize" in build.artifacts else "merge"].digest
    place = f"models/{digest}"
    local = local_folder(artifact_uri(run_id))
    if local:
        _link(build.model_path, local / place, digest)
    else:
        _must_be_as_judged(build.model_path, build.model_path, digest)
        with asking() as client:
            client.log_artifacts(run_id, str(build.model_path), place)
    return place, digest


def fetch(run_id: str, place: str, model_digest: str, label: str) -> Path:
    """The version's model folder on this machine, which lies at `place` in the run; `label` names the version in errors.

    Raises RegistryError when it is gone, or when the download has another digest.
    """
    local = local_folder(artifact_uri(run_id))
    if local is None:
        return _downloaded(run_id, place, model_digest, label)
    if not (local / place).is_dir():
        raise RegistryError(
            f"the weights of {label} are not on this machine",
            file=str(local / place),
            remedy="restore this folder, or run the same command on the machine that built it",
        )
    return local / place


def _link(source: Path, target: Path, digest: str) -> None:
    """Put hard links to the files of `source` into `target`, checked and in one step; copies on another file system."""
    with store.lock(f"release/{digest}"):
        if target.is_dir() and digest_folder(target) == digest:
            return
        beside, aside = target.with_name(f".{target.name}.partial"), target.with_name(f".{target.name}.damaged")
        for leftover in (beside, aside):
            shutil.rmtree(leftover, ignore_errors=True)
        _copy(source, beside)
        try:
            _must_be_as_judged(beside, source, digest)
        except RegistryError:
            shutil.rmtree(beside)
            raise
        if target.exists():
            target.rename(aside)
        beside.rename(target)
        shutil.rmtree(aside, ignore_errors=True)


def _must_be_as_judged(copy: Path, source: Path, digest: str) -> None:
    if digest_folder(copy) != digest:
        raise RegistryError(
            "the model folder changed since it was judged",
            file=str(source),
            remedy=f"delete {source.parent}, then tunegate run CONFIG",
        )


def _copy(source: Path, target: Path) -> None:
    def link(old: str, new: str) -> str:
        try:
            os.link(old, new)
        except OSError:  # another file system
            shutil.copy2(old, new)
        return new

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
            folder = Path(client.download_artifacts(run_id, place, str(beside)))
        digest = digest_folder(folder)
        if digest != model_digest:
            raise RegistryError(
                f"the download of {label} from MLflow has the digest {digest[:12]}",
                allowed=f"{model_digest[:12]}, as it was judged",
                remedy="restore the run's files in MLflow, or tunegate run CONFIG and approve the new version",
            )
        folder.rename(target)
        shutil.rmtree(beside)
    return target
