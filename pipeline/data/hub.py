"""Datasets on the Hugging Face hub, at a commit: the data files of one split, fetched into the hub's cache.

Files are read as they lie in the repository; a dataset's loading script or card is never followed. A file
belongs to a split when a part of its path is the split's name (train.jsonl, train/a.csv,
data/train-00000-of-00002.parquet). If no path contains the name of a split, all files are `train`.
Works offline when the commit is in the cache.
"""

from __future__ import annotations

import re
from pathlib import Path

from pipeline.data.sources import SUFFIXES
from pipeline.errors import DataError

HUB_SPLITS = {"train", "test", "validation", "valid", "val", "dev", "eval"}
GET_ONLINE = "get online (and unset HF_HUB_OFFLINE), or copy the files here and name their folder"


def fetch(repository: str, revision: str, split: str) -> list[tuple[str, Path]]:
    """The split's files as (name to show, local path), sorted.

    Raises DataError with the remedy: correct the name, commit or split, accept terms, log in, get online.
    """
    import httpx
    from huggingface_hub import errors

    try:
        names = split_files(_listing(repository, revision), split)
        files = [(f"{repository}/{name}", _file(repository, revision, name)) for name in names]
    except (errors.HfHubHTTPError, errors.OfflineModeIsEnabled, OSError, httpx.TransportError) as error:
        mistake, remedy = _explain(repository, error)
        raise DataError(mistake, file=f"{repository}@{revision[:12]}", key="data.datasets", remedy=remedy) from error
    if not files:
        raise DataError(
            f"lacks {' '.join(SUFFIXES)} files of the split {split}",
            file=f"{repository}@{revision[:12]}",
            key="data.datasets.split",
            remedy="set the dataset's `split` in the config to a name that is in the paths of its files",
        )
    return files


def split_files(names: list[str], split: str) -> list[str]:
    """A repository's data files that belong to a split."""
    data = sorted(name for name in names if name.endswith(SUFFIXES))
    parts = {name: set(re.split(r"[^A-Za-z0-9]+", name.rsplit(".", 1)[0])) for name in data}
    if split == "train" and not any(parts[name] & HUB_SPLITS for name in data):
        return data
    return [name for name in data if split in parts[name]]


def _listing(repository: str, revision: str) -> list[str]:
    """The names of all files of the commit; from the cache when the hub can't be reached."""
    import httpx
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        info = HfApi().dataset_info(repository, revision=revision)
    except (OfflineModeIsEnabled, httpx.TransportError, ConnectionError):
        folder = snapshot_download(repository, repo_type="dataset", revision=revision, local_files_only=True)
        return [path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file()]
    return [entry.rfilename for entry in info.siblings or ()]


def _file(repository: str, revision: str, name: str) -> Path:
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(repository, name, repo_type="dataset", revision=revision))


def _explain(repository: str, error: Exception) -> tuple[str, str]:
    """The failure of a request to the hub, and the remedy."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/datasets/{repository}"
    if isinstance(error, errors.GatedRepoError):
        return "is gated: its terms must be accepted first", f"accept them at {page}, then set HF_TOKEN"
    if isinstance(error, errors.RevisionNotFoundError):
        return "the commit doesn't exist", f"copy a commit from {page}/commits/main"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "the dataset doesn't exist, or it is private", f"look at {page}; for a private one set HF_TOKEN"
    if isinstance(error, errors.HfHubHTTPError) and error.response is not None:
        return f"the hub answered {error.response.status_code}", f"try again later; see {page}"
    return f"can't be fetched and is not in the cache ({type(error).__name__})", GET_ONLINE
