"""The tree of docs/architecture.md, made of `git ls-files` and each file's first sentence: `python docs/tree.py [--write]`.

Without --write the tree is printed; with it, the block between the two marks of docs/architecture.md is written anew.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architecture.md"
BLOCK = re.compile(r"(<!-- tree -->\n```text\n)(.*?)(```)", re.DOTALL)
# Folders whose files are samples: a line for all of them.
SAMPLES = ("tests/broken_data", "tests/fakes/fake_site", "tests/homes")
CAPTIONS = {
    ".ci/run": "what a change must pass",
    ".gitignore": "environments, runs, caches",
    "CHANGELOG.md": "what changed, for users",
    "LICENSE": "Apache-2.0",
    "Makefile": "short names for commands",
    "README.md": "what it is, two commands, what one sees",
    "benchmarks/README.md": "measurements, each with its command",
    "docker/Caddyfile": "the proxy of compose.yaml",
    "docker/Dockerfile": "the serving image",
    "docker/README.md": "the images and compose.yaml",
    "docker/build-local": "the serving image where no registry is reachable",
    "docker/compose.yaml": "MLflow, Prefect, worker, server and proxy together",
    "docker/pipeline.Dockerfile": "the image that builds run in",
    "docs/architecture.md": "this page",
    "docs/extending.md": "a recipe for each seam",
    "docs/kubernetes.md": "builds on a cluster",
    "locks/build.txt": "build tools, pinned",
    "locks/control.txt": "the control environment, pinned",
    "locks/model.txt": "the demo's base model, pinned",
    "locks/uv.txt": "uv, pinned with hashes",
    "prefect.yaml": "the demo's deployments",
    "pyproject.toml": "packages, lint, import contracts, test marks",
    "tests/broken_data": "files with one defect each",
    "tests/fakes/fake_site": "a vllm package that starts fake_vllm.py",
    "tests/homes": "stores that earlier versions made",
}


def tracked() -> list[str]:
    """Every file that git knows, samples folded into their folder."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    folded = {next((folder for folder in SAMPLES if path.startswith(f"{folder}/")), path) for path in listed}
    return sorted(path for path in folded if (ROOT / path).exists())


def caption(path: str) -> str:
    """A file's first sentence, or its caption here."""
    if path in CAPTIONS:
        return CAPTIONS[path]
    file = ROOT / path
    if file.suffix == ".py":
        text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    elif file.suffix in (".yaml", ".yml"):
        text = file.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
    else:
        text = ""
    first = re.split(r"(?<=[.:;])\s|\n\n", " ".join(text.split("\n\n")[0].split()), maxsplit=1)[0]
    return first.rstrip(".:;")


def lines() -> Iterator[str]:
    """The tree: a folder's line, with its package's caption, then its files'."""
    folder = None
    for path in sorted(tracked(), key=lambda path: (str(Path(path).parent), path)):
        parent, name = str(Path(path).parent), Path(path).name
        if parent != folder:
            folder = parent
            package = f"{parent}/__init__.py"
            if parent != ".":
                yield f"{parent}/".ljust(34) + (caption(package) if (ROOT / package).exists() else "")
        if name != "__init__.py":
            yield f"{'' if parent == '.' else '  '}{name}{'/' if path in SAMPLES else ''}".ljust(34) + caption(path)


def tree() -> str:
    """The block's text."""
    return "".join(f"{line.rstrip()}\n" for line in lines())


def main() -> None:
    """Print the tree, or write it into the page."""
    if "--write" in sys.argv[1:]:
        PAGE.write_text(
            BLOCK.sub(lambda match: f"{match[1]}{tree()}{match[3]}", PAGE.read_text(encoding="utf-8")), encoding="utf-8"
        )
    else:
        print(tree(), end="")


if __name__ == "__main__":
    main()
