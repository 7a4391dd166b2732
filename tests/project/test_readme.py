"""README is true: its tree is the disk, its commands exist."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import yaml

from flows.cli import parser
from pipeline.config.gate import GateConfig
from pipeline.gate import policy as gate_policy

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SPEC = importlib.util.spec_from_file_location("tree", ROOT / "docs" / "tree.py")
tree = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(tree)


def test_the_tree_is_the_disk() -> None:
    """docs/architecture.md names every file with its caption, and none that went."""
    block = tree.BLOCK.search(tree.PAGE.read_text(encoding="utf-8"))
    assert block
    assert block[2] == tree.tree(), "python docs/tree.py --write"


def test_every_file_has_a_caption() -> None:
    """A test's name says which module it is about."""
    sources = [path for path in tree.tracked() if path.endswith(".py") and not path.startswith("tests/pipeline/")]
    assert [
        path for path in sources if not tree.caption(path) and Path(path).stem not in ("__init__", "conftest")
    ] == []


def test_no_folder_outgrows_a_screen() -> None:
    """At most 20 source files; a folder that grows beyond is two rooms."""
    folders = {
        file.parent for name in ("flows", "pipeline", "tests", "benchmarks") for file in (ROOT / name).rglob("*.py")
    }
    assert {str(folder): count for folder in folders if (count := len(list(folder.glob("*.py")))) > 20} == {}


def test_every_module_has_a_test_of_its_name() -> None:
    """In the same place below tests/."""
    modules = [file.relative_to(ROOT) for name in ("flows", "pipeline") for file in (ROOT / name).rglob("*.py")]
    named = [module for module in modules if not module.stem.startswith("__") and "avx2" not in module.parts]
    assert [
        str(module) for module in named if not (ROOT / "tests" / module.with_name(f"test_{module.name}")).exists()
    ] == []


def test_readme_names_every_room() -> None:
    """With its folder, as docs/architecture.md does."""
    rooms = {f"{path.parent.name}/" for path in (ROOT / "pipeline").glob("*/__init__.py")}
    assert {room for room in rooms if room not in README} == set()


def test_every_link_leads_somewhere() -> None:
    """A relative link of README and docs/ is a file of the project."""
    for page in (
        ROOT / "README.md",
        *(ROOT / "docs").glob("*.md"),
        ROOT / "benchmarks" / "README.md",
        ROOT / "docker" / "README.md",
    ):
        links = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
        assert [link for link in links if not (page.parent / link).exists()] == [], page


def test_every_command_in_readme_exists() -> None:
    """A `tunegate` or `make` line that a reader copies is understood."""
    commands = {name for action in parser()._actions for name in (action.choices or {})}
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert (
        set(re.findall(r"\btunegate ([a-z]+)\b(?! is)", "\n".join(re.findall(r"`[^`]+`|```.*?```", README, re.DOTALL))))
        <= commands
    )
    makes = re.findall(r"(?:`|^\$ |^)make ([a-z-]+)", README, re.MULTILINE)
    assert len(set(makes)) >= 5  # in running text and in console blocks
    assert set(makes) <= targets


def test_the_policy_in_readme_is_one() -> None:
    """Every key is known, and the allowed regression names a check of it."""
    (text,) = re.findall(r"```yaml\n(gate:.*?)```", README, re.DOTALL)
    policy = GateConfig.model_validate(yaml.safe_load(text)["gate"])
    assert list(gate_policy.unknown_checks(policy)) == []
