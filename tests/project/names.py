"""How many names say what happened to a value instead of what it holds: `python tests/project/names.py [FILE or FOLDER ...]`.

Counted are bindings in flows/ and pipeline/: assignments, loop variables, parameters, fields, `as` and walrus names. A name is
vague when it is a participle or a pronoun (`found`, `made`, `other`), or one of five nouns that hold anything (`value`, `result`).
"""

from __future__ import annotations

import ast
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = ("flows", "pipeline")
PRONOUNS = frozenset(
    [
        "one",
        "ones",
        "other",
        "others",
        "another",
        "each",
        "what",
        "which",
        "who",
        "whom",
        "this",
        "that",
        "these",
        "those",
        "it",
        "them",
        "they",
        "all",
        "some",
        "any",
        "both",
    ]
)
IRREGULAR = frozenset(
    [
        "begun",
        "bound",
        "broken",
        "built",
        "bought",
        "caught",
        "chosen",
        "cut",
        "done",
        "drawn",
        "driven",
        "fallen",
        "fed",
        "felt",
        "forgotten",
        "found",
        "frozen",
        "given",
        "gone",
        "got",
        "grown",
        "heard",
        "held",
        "hidden",
        "kept",
        "known",
        "laid",
        "led",
        "left",
        "lent",
        "lost",
        "made",
        "meant",
        "met",
        "paid",
        "put",
        "read",
        "risen",
        "run",
        "said",
        "seen",
        "sent",
        "set",
        "shown",
        "shut",
        "slept",
        "sold",
        "spent",
        "split",
        "spoken",
        "stood",
        "struck",
        "taken",
        "taught",
        "thought",
        "told",
        "torn",
        "understood",
        "used",
        "won",
        "worn",
        "written",
    ]
)
# Nouns and adjectives that end or look like a participle, and terms of the field.
NOT_PARTICIPLES = frozenset(
    [
        "seed",
        "speed",
        "need",
        "feed",
        "bed",
        "embed",
        "hundred",
        "indeed",
        "shed",
        "weed",
        "cut",
        "put",
        "read",
        "run",
        "set",
        "split",
        "left",
    ]
)
NOUNS = frozenset(["value", "result", "item", "data", "obj"])


def is_participle_or_pronoun(name: str) -> bool:
    """Whether the whole name is a past participle or a pronoun, such as `found`, `wanted` or `_other`."""
    word = name.strip("_")
    if word in PRONOUNS:
        return True
    if word in NOT_PARTICIPLES:
        return False
    return word in IRREGULAR or re.fullmatch(r"[a-z]{2,}ed", word) is not None


def bindings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and name of everything that is bound, but functions, classes and imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.arg) and node.arg not in ("self", "cls"):
            yield node.lineno, node.arg
        elif isinstance(node, ast.ExceptHandler | ast.MatchAs) and node.name:
            yield node.lineno, node.name


def files(places: list[str]) -> list[Path]:
    """The Python files in these places, or in all of the source."""
    roots = [Path(place) for place in places] or [ROOT / name for name in SOURCES]
    return sorted(file for root in roots for file in ([root] if root.is_file() else root.rglob("*.py")))


def count(places: list[str]) -> tuple[int, Counter[str], Counter[str], list[str]]:
    """All bindings, the vague names and the nouns by how often they are bound, and where each vague one stands."""
    total, vague, nouns, lines = 0, Counter[str](), Counter[str](), []
    for file in files(places):
        for line, name in bindings(ast.parse(file.read_text(encoding="utf-8"))):
            total += 1
            if is_participle_or_pronoun(name):
                vague[name] += 1
                lines.append(f"{file}:{line}: {name}")
            elif name in NOUNS:
                nouns[name] += 1
    return total, vague, nouns, lines


def main() -> None:
    """Print the shares, and with places given every vague name's line."""
    total, vague, nouns, lines = count(sys.argv[1:])
    if sys.argv[1:]:
        print(*lines, sep="\n")
    for label, names in (("participles and pronouns", vague), ("vague nouns", nouns)):
        share = sum(names.values()) / max(1, total)
        most = ", ".join(f"{name} {times}" for name, times in names.most_common(12))
        print(f"{label}: {sum(names.values())} of {total} bindings, {share:.2%}: {most}")


if __name__ == "__main__":
    main()
