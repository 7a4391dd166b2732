"""A config file as resolved JSON, remembered by the digest of all it was read from.

Reading a config needs pydantic, which takes longer to import than everything else that `tunegate check` does; a file that was
found right once needs no second look until it, or the code that judges it, changes. Standard library only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline import environments, store
from pipeline.digests import digest_file, digest_of
from pipeline.program import write_json

JUDGES = ("config.py", "config_file.py", "resolve.py")


def resolve(path: Path, overrides: Sequence[str] = (), data_dir: Path | None = None) -> dict[str, Any]:
    """The resolved config as JSON, every default filled in and every path absolute.

    Raises ConfigError with all mistakes of the file.
    """
    memory = _memory(path, overrides, data_dir) if path.is_file() else None
    if memory and memory.is_file():
        return dict(json.loads(memory.read_text(encoding="utf-8")))
    from pipeline.config_file import load

    config = load(path, overrides, data_dir).model_dump(mode="json")
    if memory:
        memory.parent.mkdir(parents=True, exist_ok=True)
        write_json(memory, config)
    return config


def _memory(path: Path, overrides: Sequence[str], data_dir: Path | None) -> Path:
    code = {name: digest_file(Path(__file__).with_name(name)) for name in JUDGES}
    root = (data_dir or path.parent).resolve()
    key = digest_of({"file": digest_file(path), "root": str(root), "stem": path.stem, "overrides": list(overrides), "code": code,
                     "there": sorted(entry.name for entry in root.iterdir()) if root.is_dir() else []})  # fmt: skip
    return store.home() / "work" / "configs" / f"{key[:32]}.json"


def sources(config: Mapping[str, Any]) -> dict[str, str]:
    """Digests of what comes from outside: the base model's under "base", the data files' under "prepare".

    Raises ModelError or DataError when one isn't there.
    """
    from pipeline import data, model

    train = environments.find("train", environments.settings(config))
    base = model.locate(config["base_model"], config["base_model_revision"], Path.cwd(), train)
    return {"base": base.digest, "prepare": data.sources_digest(config["data"])}
