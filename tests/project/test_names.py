"""Names say what a value holds; tests/project/names.py prints the shares and where each vague name stands."""

from __future__ import annotations

import ast

from project import names

MOST_PARTICIPLES, MOST_NOUNS = 0.01, 0.0233  # nouns: their share before the rooms


def test_few_names_are_participles_or_pronouns() -> None:
    """Below one binding in a hundred; `value`, `item` and the like are no way out."""
    total, vague, nouns, lines = names.count([])
    assert sum(vague.values()) < MOST_PARTICIPLES * total, "\n".join(lines)
    assert sum(nouns.values()) <= MOST_NOUNS * total, nouns.most_common()


def test_every_kind_of_binding_is_counted() -> None:
    """Assignments, loops, parameters, walrus, `as` and except; an attribute or a keyword argument is none."""
    text = (
        "found = 1\nfor one in x: pass\ndef f(wanted, *, told=2): pass\n[y for kept in x]\nwith a as held: pass\n"
        "if (made := 1): pass\ntry: pass\nexcept E as known: pass\na.shown = f(asked=3)\ndigest = found\n"
    )
    bound = [name for _, name in names.bindings(ast.parse(text))]
    vague = {name for name in bound if names.is_participle_or_pronoun(name)}
    assert vague == {"found", "one", "wanted", "told", "kept", "held", "made", "known"}
    assert "digest" in bound
