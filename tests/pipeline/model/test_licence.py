from __future__ import annotations

import pytest

from pipeline.model import licence


@pytest.mark.parametrize(
    ("card", "found"),
    [
        ("---\nlicense: apache-2.0\ntags: [a]\n---\ntext", "apache-2.0"),
        ("---\nlicense: other\nlicense_name: llama3.1\n---\n", "llama3.1"),
        ("---\nlanguage: en\n---\nlicense: mit\n", None),
        ("---\n{broken: [\n---\n", None),
        ("no front matter", None),
    ],
)
def test_the_cards_front_matter_says_the_licence(tmp_path, card, found):
    """Only the front matter counts, and a licence of its own name is told by that name."""
    (tmp_path / "README.md").write_text(card)
    assert licence.of_folder(tmp_path) == found


def test_without_a_card_the_text_of_the_licence_file_says_it(tmp_path):
    """The Apache licence as it stands in files, centred and over two lines, is known by its name."""
    (tmp_path / "LICENSE").write_text(" " * 33 + "Apache License\n" + " " * 27 + "Version 2.0, January 2004\n")
    (tmp_path / "LICENSES_of_others.md").write_text("MIT License")
    assert licence.of_folder(tmp_path) == "apache-2.0"
    assert [path.name for path in licence.files(tmp_path)] == ["LICENSE"]
