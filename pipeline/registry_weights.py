"""The weights of a registered version: in the MLflow run's artifact folder, checked against what was judged.

MLflow refuses a version whose local source lies elsewhere, so a local folder gets hard links to the
store's files; a remote one gets an upload, and a machine that serves from it downloads once.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from pipeline import store
from pipeline.artifacts import Build
from pipeline.digests import digest_folder
from pipeline.errors import RegistryError
from pipeline.registry_client import artifact_uri, asking, local_folder

MODEL = "model"


def put(run_id: str, build: Build) -> tuple[str, str]:
    """Hard-link (or upload) the judged folder into the run; returns its URI and its digest.

    Raises RegistryError when the folder is no longer what was judged.
    """
    judged = build.artifacts["quantize" if "quantize" in build.artifacts else "merge"].digest
    uri = artifact_uri(run_id)
    local = local_folder(uri)
    if local:
        _link(build.model_path, local / MODEL)
    if digest_folder(local / MODEL if local else build.model_path) != judged:
        if local:
            shutil.rmtree(local / MODEL)
        raise RegistryError(
            "the model folder changed since it was judged",
            file=str(build.model_path),
            remedy=f"delete {build.model_path.parent}, then tunegate run CONFIG",
        )
    if not local:
        with asking() as client:
            client.log_artifacts(run_id, str(build.model_path), MODEL)
    return f"{uri}/{MODEL}", judged


def fetch(run_id: str, model_digest: str, label: str) -> Path:
    """The run's model folder on this machine; `label` names the version in errors.

    Raises RegistryError when it is gone, or when what was downloaded hasn't the digest.
    """
    local = local_folder(artifact_uri(run_id))
    if local is None:
        return _downloaded(run_id, model_digest, label)
    if not (local / MODEL).is_dir():
        raise RegistryError(
            f"the weights of {label} are not on this machine",
            file=str(local / MODEL),
            remedy="restore them, or use the machine that built them",
        )
    return local / MODEL


def _link(source: Path, target: Path) -> None:
    """Put hard links to the files of `source` into `target`, in one step; copies on another file system."""
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.rmtree(beside, ignore_errors=True)

    def link(one: str, other: str) -> str:
        try:
            os.link(one, other)
        except OSError:  # another file system
            shutil.copy2(one, other)
        return other

    shutil.copytree(source, beside, copy_function=link)
    if target.exists():
        shutil.rmtree(target)
    beside.rename(target)


def _downloaded(run_id: str, model_digest: str, label: str) -> Path:
    target = store.home() / "work" / "releases" / model_digest
    with store.lock(f"release/{model_digest}"):
        if target.is_dir():
            return target
        beside = target.with_name(f".{target.name}.partial")
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        with asking() as client:
            found = Path(client.download_artifacts(run_id, MODEL, str(beside)))
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
