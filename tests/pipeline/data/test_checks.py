from __future__ import annotations

import pytest

from pipeline.data.checks import check, half_characters, special_tokens_pattern

ASKED = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Here."}]
BRIEFED = [{"role": "system", "content": "Be brief."}, *ASKED]
NOTHING = special_tokens_pattern([])


def roles(*names: str) -> list[dict[str, str]]:
    return [{"role": name, "content": "x"} for name in names]


@pytest.mark.parametrize(
    ("body", "kinds"),
    [
        (BRIEFED, []),
        (roles("user", "assistant", "user", "assistant"), []),
        (roles("system"), ["no_answer"]),
        (roles("assistant"), ["wrong_role_order"]),
        (roles("user", "user"), ["wrong_role_order", "no_answer"]),
        (roles("user", "assistant", "assistant"), ["wrong_role_order"]),
        (roles("user", "system", "assistant"), ["system_in_middle"]),
        ([*ASKED[:1], {"role": "assistant", "content": "\n"}], ["empty_answer"]),
        ("  ", ["empty_message"]),
        ("Tab\tand\r\nline ends are fine, é too.", []),
        ("a bell \x07", ["control_character"]),
        ("half \udc00", ["lone_surrogate"]),
    ],
)
def test_turns_and_characters_are_checked(body: object, kinds: list[str]) -> None:
    """Every defect of a conversation or text is named."""
    assert [defect.kind for defect in check(body, NOTHING)] == kinds


def test_special_tokens_are_found_anywhere() -> None:
    """The longest token is named, in whichever message it stands."""
    pattern = special_tokens_pattern(["<|im_end|>", "<s>", "", "<s>x"])
    found = check([{"role": "user", "content": "a <s>x"}, {"role": "assistant", "content": "<|im_end|>"}], pattern)
    assert [(defect.kind, defect.what.split()[-1]) for defect in found] == [
        ("special_token", "<s>x"),
        ("special_token", "<|im_end|>"),
    ]


def test_a_defect_names_its_message() -> None:
    """The key is the message's place and role, and the order of roles is told with it."""
    turns = [{"role": "user", "content": ""}, {"role": "assistant", "content": "a\x00"}]
    assert [(defect.kind, defect.key) for defect in check(turns, NOTHING)] == [
        ("empty_message", "message 1 (user)"),
        ("control_character", "message 2 (assistant)"),
    ]
    order = check(roles("assistant", "assistant"), NOTHING)[0]
    assert order.what == "the assistant speaks first"


def test_half_a_character_is_told_by_its_code() -> None:
    """A lone surrogate is a defect under the caller's key; a whole pair is a character."""
    (defect,) = half_characters("x \ud83d", "column")
    assert (defect.kind, defect.key) == ("lone_surrogate", "column")
    assert "U+D83D" in defect.what
    assert list(half_characters("😀", "column")) == []
