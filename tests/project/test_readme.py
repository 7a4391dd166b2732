"""README is true: its tree is the disk, its commands exist."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import yaml

from flows.cli import parser
from pipeline.config.gate import GateConfig
from pipeline.gate import policy as gate_policy

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def tracked() -> set[str]:
    """Top-level names, and the files of flows/, pipeline/ and configs/; a module's parts (data_*.py of data.py) stand with it."""
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    inside = [
        path
        for path in listed
        if path.startswith(("flows/", "pipeline/", "configs/")) and not path.endswith("__init__.py")
    ]
    stems = {path.rpartition(".py")[0] for path in inside if path.endswith(".py")}
    files = {path for path in inside if not any(path.startswith((f"{stem}_", f"{stem}.html")) for stem in stems)}
    top = {path.split("/")[0] + ("/" if "/" in path else "") for path in listed}
    return files | {name for name in top if not name.startswith(".git")}


def drawn() -> set[str]:
    """What README's tree names: folders end in a slash, files are indented under theirs."""
    block = re.search(r"<!-- tree -->\n```text\n(.*?)```", README, re.DOTALL)
    assert block
    names, folder = set(), ""
    for line in block.group(1).splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            folder = name if name.endswith("/") else ""
            names.add(name)
        else:
            names.add(folder + name)
    return names


def test_the_tree_is_the_disk() -> None:
    """Each file has its caption, and no caption is left of a file that went."""
    assert drawn() == tracked()


def test_every_command_in_readme_exists() -> None:
    """A `tunegate` or `make` line that a reader copies is understood."""
    commands = {name for action in parser()._actions for name in (action.choices or {})}
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert (
        set(re.findall(r"\btunegate ([a-z]+)\b(?! is)", "\n".join(re.findall(r"`[^`]+`|```.*?```", README, re.DOTALL))))
        <= commands
    )
    assert set(re.findall(r"`make ([a-z-]+)`|^make ([a-z-]+)", README, re.MULTILINE)[0]) - {""} <= targets


def test_the_policy_in_readme_is_one() -> None:
    """Every key is known, and the allowed regression names a check of it."""
    (text,) = re.findall(r"```yaml\n(gate:.*?)```", README, re.DOTALL)
    policy = GateConfig.model_validate(yaml.safe_load(text)["gate"])
    assert list(gate_policy.unknown_checks(policy)) == []
