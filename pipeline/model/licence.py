"""A model's licence, from its card's front matter, else from the text of its licence file."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

# The first words of licence texts, by the name that hubs give them.
TEXTS = {
    "apache-2.0": r"apache license\s+version 2\.0",
    "mit": r"\bmit license\b|permission is hereby granted, free of charge",
    "cc-by-nc-4.0": r"attribution-noncommercial 4\.0 international",
    "cc-by-sa-4.0": r"attribution-sharealike 4\.0 international",
    "cc-by-4.0": r"attribution 4\.0 international",
    "gpl-3.0": r"gnu general public license\s+version 3",
    "gemma": r"gemma terms of use",
    "llama": r"llama [\d.]+ (community|version)",
}
LICENCE_FILE = re.compile(r"(LICEN[CS]E|COPYING|NOTICE|USE_POLICY)([._-].*)?", re.IGNORECASE)


def of_folder(folder: Path) -> str | None:
    """The licence of the model in `folder`, by its hub name; None if neither card nor licence file tells."""
    names = (of_text(path.read_text(encoding="utf-8", errors="replace")) for path in files(folder))
    return _of_card(folder / "README.md") or next(filter(None, names), None)


def of_text(text: str) -> str | None:
    """The hub name of the licence with this text; None for one that isn't in TEXTS."""
    head = text[:5000].lower()
    return next((name for name, pattern in TEXTS.items() if re.search(pattern, head)), None)


def files(folder: Path) -> list[Path]:
    """The licence and notice files at the top of `folder`; most licences must be passed on with the model."""
    return sorted(path for path in folder.iterdir() if path.is_file() and LICENCE_FILE.fullmatch(path.name))


def copy(source: Path, target: Path) -> None:
    """Copy the licence and notice files."""
    for path in files(source):
        shutil.copyfile(path, target / path.name)


def _of_card(card: Path) -> str | None:
    if not card.is_file():
        return None
    import yaml

    front = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    try:
        meta = yaml.safe_load(front[1]) if front else None
    except yaml.YAMLError:
        return None
    if not isinstance(meta, dict):
        return None
    name = meta.get("license_name") if meta.get("license") == "other" else meta.get("license")
    return str(name) if name else None
