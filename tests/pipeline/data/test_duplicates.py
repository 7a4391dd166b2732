from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import programs

from pipeline.data import duplicates

# Finds near rows among questions drawn from a few words, by the stage's way and by comparing all pairs.
COMPARE = """
import itertools, json, random, sys
from pathlib import Path
from pipeline.data import duplicates as data_duplicates
from pipeline.data import rows as data_rows
draw, db = random.Random(5), data_rows.create(Path(sys.argv[1]) / "rows.sqlite")
words = [f"w{n}" for n in range(60)]
bodies = []
for _ in range(200):
    start = [draw.choice(words) for _ in range(30)]
    for _ in range(8):
        start = [draw.choice(words) if draw.random() < 0.03 else word for word in start]
        asked = {"role": "user", "content": " ".join(start)}
        bodies.append([asked, {"role": "assistant", "content": "yes"}])
draw.shuffle(bodies)
file = data_rows.add_file(db, "rows.jsonl")
data_rows.add(db, [data_rows.SoundRow(0, file, n, body, 9, 1) for n, body in enumerate(bodies, 1)], 0)
data_duplicates.drop_equal(db)
db.execute("UPDATE rows SET split = CASE WHEN n % 5 THEN 'train' ELSE 'holdout' END")
kept = {line for line, in db.execute("SELECT line FROM rows WHERE dropped IS NULL")}
found = {}
for pair in data_duplicates.find_near(db, 0.7, lambda done, total: None):
    if pair.leak:
        found[pair.first.line] = pair.similarity
sets = {line: data_duplicates.shingles(bodies[line - 1][0]["content"]) for line in kept}
expected = {}
for held in (line for line in kept if line % 5 == 0):
    best = max(data_duplicates.jaccard(sets[held], sets[line]) for line in kept if line % 5)
    if best >= 0.7:
        expected[held] = best
print(json.dumps({"found": found, "expected": expected, "rows": len(kept)}))
"""


@pytest.mark.slow
def test_hashing_finds_what_comparing_all_pairs_finds(tmp_path: Path) -> None:
    """Of the holdout rows near a training row at least 99 % are found, and nothing else is."""
    answer = json.loads(programs.python(COMPARE, tmp_path).splitlines()[-1])
    found, expected = answer["found"], answer["expected"]
    assert len(expected) > 100
    assert found.keys() <= expected.keys()
    assert len(found) >= 0.99 * len(expected)
    assert all(found[line] <= round(expected[line], 4) for line in found)


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.8, 0.9, 1.0])
def test_bands_find_a_pair_at_the_threshold(threshold: float) -> None:
    """The chance of a common bucket is 99 % at the threshold, and one more row a band would make it less."""
    bands, rows = duplicates.bands_for(threshold)
    assert bands * rows <= duplicates.PERMUTATIONS
    assert 1 - (1 - threshold**rows) ** bands >= 0.99
    longer = duplicates.PERMUTATIONS // (rows + 1)
    assert not longer or 1 - (1 - threshold ** (rows + 1)) ** longer < 0.99


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Where is my card?", {"where is my", "is my card"}),
        ("My card!", {"my card"}),
        ("", set()),
        ("我的卡在", {"我 的 卡", "的 卡 在"}),
        ("iPhone の色は", {"iphone の 色", "の 色 は"}),
    ],
)
def test_shingles_are_word_trigrams_of_the_folded_text(text: str, expected: set[str]) -> None:
    """Short texts are one shingle; in scripts without spaces a character stands for a word."""
    assert duplicates.shingles(text) == expected


def turn(question: str, system: str = "") -> list[dict[str, str]]:
    briefed = [{"role": "system", "content": system}] if system else []
    return [*briefed, {"role": "user", "content": question}, {"role": "assistant", "content": "yes"}]


def test_a_shared_system_message_makes_rows_no_more_alike() -> None:
    """Similarity is that of the questions; different system messages make equal questions different."""
    rules = "Answer the question about the document that follows, in one short sentence, please."
    assert duplicates.similarity(turn("Where is it?", rules), turn("When was it?", rules)) == 0
    assert duplicates.similarity(turn("Where is it?", rules), turn("where is it", rules)) == 1
    other = "The document says that the contract ends in May and is renewed each year."
    assert duplicates.similarity(turn("Where is it?", rules), turn("Where is it?", other)) == 0
