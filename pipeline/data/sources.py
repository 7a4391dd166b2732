"""The files of a dataset (a file, a folder, or a hub dataset at a fixed commit), and their digest.

Every `tunegate check` computes the digest: standard library only, and an unchanged file isn't read again.
Folders are searched with their subfolders; hidden files are left out.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.data.defects import Defect
from pipeline.digests import digest_of
from pipeline.errors import ConfigError, DataError, Problem
from pipeline.file_digests import remembered
from pipeline.store import home

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
BENCHMARK_SUFFIXES = (*SUFFIXES, ".txt")
GROUPS = {"datasets": SUFFIXES, "test_datasets": SUFFIXES, "benchmarks": BENCHMARK_SUFFIXES}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".tgz", ".7z")
DEMO = ("tickets-train.jsonl", "tickets-holdout.jsonl")
COMMIT = re.compile(r"[0-9a-f]{40}")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

Source = Mapping[str, Any]


def is_hub_id(path: str) -> bool:
    """Whether a dataset path names a hub dataset, OWNER/NAME, and not an existing file."""
    return not Path(path).exists() and not path.endswith((*SUFFIXES, *COMPRESSED)) and bool(HUB_ID.fullmatch(path))


@dataclass(frozen=True)
class ConfigSource:
    """A source with its key in the config, such as data.datasets.0, and the suffixes that its files may have."""

    key: str
    source: Source
    suffixes: tuple[str, ...]

    def problem(self, defect: Defect) -> Problem:
        """A defect of its path as a problem; for the demo's data the remedy is the command that writes it."""
        problem = replace(defect.problem(self.source["path"]), key=f"{self.key}.path")
        if defect.kind != "missing_file" or Path(self.source["path"]).name not in DEMO:
            return problem
        folder = home() / "demo"
        return replace(
            problem,
            remedy=f"tunegate demo --data-only, then the same command with --data-dir {folder}",
        )


def sources(data: Mapping[str, Any], group: str) -> list[ConfigSource]:
    """The sources of a data config's `datasets`, `test_datasets` or `benchmarks`."""
    return [ConfigSource(f"data.{group}.{place}", source, GROUPS[group]) for place, source in enumerate(data[group])]


def local_files(path: Path, suffixes: tuple[str, ...] = SUFFIXES) -> list[Path] | Defect:
    """The data files of a file or folder, sorted by name, or its defect."""
    if not path.exists():
        return Defect(
            "missing_file", "the file or folder doesn't exist", allowed=", ".join(_near(path, suffixes)) or None
        )
    if not os.access(path, os.R_OK):
        return Defect("unreadable_file", "isn't readable for this user")
    if path.is_file():
        return _wrong_suffix(path, suffixes) or [path]
    inside = sorted(entry for entry in path.rglob("*") if entry.is_file() and not _is_hidden(entry, path))
    archives = [entry for entry in inside if _is_packed_data(entry)]
    if archives:
        return Defect("compressed_file", f"holds packed data: {archives[0].relative_to(path)}")
    data_files = [entry for entry in inside if entry.suffix in suffixes]
    return data_files or Defect("no_data_files", "must hold at least one data file", allowed=" ".join(suffixes))


def _near(path: Path, suffixes: tuple[str, ...]) -> list[str]:
    """Up to ten data files in the folder of `path`; also its folders, if `path` doesn't end like a file."""
    beside = path.parent.iterdir() if path.parent.is_dir() else ()
    fit = (entry for entry in beside if entry.suffix in suffixes or (not path.suffix and entry.is_dir()))
    return sorted(entry.name for entry in fit if not entry.name.startswith("."))[:10]


def sources_digest(data: Mapping[str, Any]) -> str:
    """SHA-256 over the bytes of all files of a data config (as JSON); a hub dataset counts by its commit.

    Raises DataError naming every file that is missing or isn't a data file, ConfigError for a hub dataset without
    a commit.
    """
    problems: list[Problem] = []
    all_sources = [entry for group in GROUPS for entry in sources(data, group)]
    parts = [_digest_parts(entry, problems) for entry in all_sources]
    revision_problems = [_revision_problem(entry) for entry in all_sources if _moves(entry.source)]
    if problems:
        raise DataError([*problems, *revision_problems])
    if revision_problems:
        raise ConfigError(revision_problems)
    return digest_of([[len(data[group]) for group in GROUPS], *parts])


def _digest_parts(entry: ConfigSource, problems: list[Problem]) -> list[Any]:
    source = entry.source
    if is_hub_id(source["path"]):
        return ["hub", source["path"], source["revision"], source["split"]]
    data_files = local_files(Path(source["path"]), entry.suffixes)
    if isinstance(data_files, Defect):
        problems.append(entry.problem(data_files))
        return []
    return [[file.name, remembered(file)] for file in data_files]


def _moves(source: Source) -> bool:
    return is_hub_id(source["path"]) and not COMMIT.fullmatch(source["revision"] or "")


def _revision_problem(entry: ConfigSource) -> Problem:
    path, revision = entry.source["path"], entry.source["revision"]
    reason = f": {revision} isn't a commit" if revision else ""
    return Problem(
        f"the hub dataset {path} must be pinned to a commit{reason}",
        key=f"{entry.key}.revision",
        allowed="a commit, 40 hex digits",
        remedy="copy the commit from the history on the dataset's page; if you meant a file, correct the path",
    )


def _wrong_suffix(path: Path, suffixes: tuple[str, ...]) -> Defect | None:
    if path.suffix in suffixes:
        return None
    kind = "compressed_file" if path.suffix in COMPRESSED else "unsupported_file"
    return Defect(kind, f"{path.suffix or 'no suffix'} is not supported", allowed=" ".join(suffixes))


def _is_hidden(entry: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in entry.relative_to(root).parts)


def _is_packed_data(entry: Path) -> bool:
    return entry.suffix in COMPRESSED and Path(entry.stem).suffix in SUFFIXES
