from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipeline.data import ngrams
from pipeline.data import rows as data_rows
from pipeline.data.ngrams import COMMON, INSIDE, Filter, Index, Needle, Text, Words, grams_of

VOCABULARY = [f"word{n}" for n in range(500)]
Fill = Callable[..., Index]


def sentence(seed: object, size: int = 20) -> str:
    return " ".join(random.Random(str(seed)).choices(VOCABULARY, k=size))


@pytest.fixture
def filled(tmp_path: Path) -> Fill:
    """An index of needles, each looked for by its 8-grams or as a whole, after these rows were searched."""

    def fill(needles: list[str], rows: list[str | list[Text]]) -> Index:
        index = Index(data_rows.create(tmp_path / "rows.sqlite"))
        split = [data_rows.words(text) for text in needles]
        index.add(Needle("x", 1, n, needles[n], grams_of([text], INSIDE)) for n, text in enumerate(split))
        texts = [[Text(n, row, is_prompt=True)] if isinstance(row, str) else row for n, row in enumerate(rows)]
        index.search((text for some in texts for text in some), len(rows), lambda done, total: None)
        return index

    return fill


def test_every_ngram_inside_a_text_is_found_and_none_across_two() -> None:
    """Keys are those of each run of words, equal for equal words only; the runs don't leave their text."""
    texts = [data_rows.words(sentence(n, size)) for n, size in enumerate((3, 8, 12, 0, 30, 9))]
    for size in (8, 9, 13):
        ((_, places, keys),) = Words.of(texts).ngrams([size])
        runs = [tuple(text[n : n + size]) for text in texts for n in range(len(text) - size + 1)]
        assert len(places) == len(runs)
        assert len(set(keys.tolist())) == len(set(runs))
        assert keys.tolist() == [gram[0] for run in runs for gram in grams_of([run], size)]
        assert keys[0] != grams_of([runs[0][::-1]], size)[0][0]


def test_a_shorter_text_is_an_ngram_as_a_whole() -> None:
    """It is found where it is all of a text, with its place; what is shorter than three words is none."""
    five = data_rows.words(sentence(1, 5))
    ((key, place, size),) = grams_of([["two", "words"], five], 13)
    assert (place, size) == (2, 5)
    ((_, places, keys),) = Words.of([[*five, "more"], ["less", *five], five]).ngrams([5])
    assert (places.tolist(), keys.tolist()) == ([12], [key])


def test_the_filter_lets_every_added_key_through_and_few_others() -> None:
    """No false negative among 100,000; of as many others fewer than one in a hundred passes."""
    keys = np.random.default_rng(1).integers(-(2**63), 2**63, 200_000)
    known = Filter()
    known.add(keys[:100_000])
    assert known.may_have(keys[:100_000]).all()
    assert known.may_have(keys[100_000:]).mean() < 0.01


def found(index: Index, *, prompts_only: bool = False) -> dict[int, list[int]]:
    """Rows by needle."""
    return dict(index.candidates("x", prompts_only=prompts_only))


def test_a_text_is_found_inside_a_longer_row(filled: Fill) -> None:
    """Whole, in another case and punctuation, or a part of it; a text that isn't there is not found."""
    needles = [sentence(n) for n in range(4)]
    part = " ".join(needles[2].split()[:14])
    rows = [
        f"{sentence('a')} {needles[0]} {sentence('b')}",
        f"{sentence('c')}! {needles[1].upper().replace(' ', ', ')} {sentence('d')}",
        f"{sentence('e')} {part} {sentence('f')}",
        sentence("g", 200),
    ]
    index = filled(needles, rows)
    assert found(index) == {1: [0], 2: [1], 3: [2]}
    shares = [index.share("x", [needles[n].split()], [Text(n, rows[n], is_prompt=True)]) for n in range(3)]
    assert shares == [1.0, 1.0, 7 / 13]
    assert [index.share_of_counting(n + 1, n) for n in range(3)] == shares
    assert index.longest_in_common(2, 1, [Text(1, rows[1], is_prompt=True)]) == " ".join(needles[1].split()[:8])


def test_the_rows_that_have_most_of_a_text_come_first(filled: Fill) -> None:
    """One with a part comes after those with all, which come in their order."""
    needle = sentence(1)
    rows = [f"{sentence('a')} {' '.join(needle.split()[:9])}", *(f"{sentence(n)} {needle}" for n in range(2))]
    assert found(filled([needle, sentence(2)], rows)) == {1: [1, 2, 0]}


def test_short_texts_are_found_as_whole_messages_only(filled: Fill) -> None:
    """Four words as an earlier turn are a finding, the same words in a sentence are not; two words are never one."""
    needles = ["where is my parcel", "yes please", "how does it work"]
    turns = [Text(0, "Where is my parcel?", is_prompt=True), Text(0, "yes, please", is_prompt=True)]
    index = filled(needles, [turns, "tell me first how does it work and why"])
    assert found(index) == {1: [0]}
    assert index.share("x", [needles[0].split()], turns) == 1.0


TEMPLATE = sentence("template", 40)


def test_a_template_that_rows_and_needles_share_is_no_finding(filled: Fill) -> None:
    """Forty shared words before twelve of a row's own: nothing is found, but the own words are, alone in a row."""
    needles = [f"{TEMPLATE} {sentence(n, 12)}" for n in range(5)]
    rows = [f"{TEMPLATE} {sentence(('row', n), 12)}" for n in range(30)]
    assert found(filled(needles, rows)) == {}
    rows.append(f"{sentence('a')} {needles[3].removeprefix(TEMPLATE)} {sentence('b')}")
    index = filled(needles, rows)
    assert found(index) == {4: [30]}
    assert index.share("x", [needles[3].split()], [Text(30, rows[30], is_prompt=True)]) == 1.0
    assert index.share("x", [needles[3].split()], [Text(0, rows[0], is_prompt=True)]) == 0.0


def test_a_phrase_of_some_texts_stays_a_part_of_them(filled: Fill) -> None:
    """Twelve of forty words that eleven of many texts share: a row with these alone is none, but they are counted."""
    phrase = sentence("phrase", 12)
    needles = [f"{sentence(n, 28)} {phrase if n <= COMMON else ''}" for n in range(200)]
    rows = [f"{sentence('a')} {phrase}", f"{sentence('b')} {' '.join(needles[3].split()[:28])}"]
    index = filled(needles, rows)
    assert found(index) == {4: [1]}
    assert index.share("x", [needles[3].split()], [Text(1, rows[1], is_prompt=True)]) == 21 / 33


@pytest.mark.parametrize(
    ("needles", "rows", "is_found"),
    [
        pytest.param(1, COMMON + 5, True, id="one text in a dozen of many rows is a leak"),
        pytest.param(2, COMMON, True, id="two texts share it and ten rows have it"),
        pytest.param(2, COMMON + 1, False, id="two texts share it and eleven rows have it"),
        pytest.param(1, 60, False, id="most rows have it"),
        pytest.param(COMMON, 3, True, id="ten of many texts share it"),
        pytest.param(COMMON + 1, 3, False, id="eleven texts share it"),
    ],
)
def test_what_many_share_does_not_count(filled: Fill, needles: int, rows: int, is_found: bool) -> None:
    """The rule at its edges, among a hundred rows and thirty texts."""
    shared = sentence("shared", 12)
    texts = [f"{sentence(n)} {shared if n < needles else ''}" for n in range(30)]
    searched = [f"{sentence(('row', n))} {shared if n < rows else ''}" for n in range(100)]
    assert bool(found(filled(texts, searched))) is is_found


def test_what_an_assistant_says_can_be_left_out(filled: Fill) -> None:
    """`prompts_only` finds a text in what a model reads, not in what it is to say."""
    needles = [sentence(n) for n in range(3)]
    said, asked = (Text(n, f"{sentence('a')} {needles[n]}", is_prompt=bool(n)) for n in range(2))
    index = filled(needles, [[said], [asked]])
    assert found(index) == {1: [0], 2: [1]}
    assert found(index, prompts_only=True) == {2: [1]}


def test_rows_are_searched_in_batches_without_loss(filled: Fill, monkeypatch: pytest.MonkeyPatch) -> None:
    """However small a batch is, all of a row's messages are looked at."""
    monkeypatch.setattr(ngrams, "BATCH_CHARACTERS", 1)
    needles = [sentence(n) for n in range(3)]
    rows = [[Text(n, sentence(("x", n)), is_prompt=True), Text(n, needles[n], is_prompt=True)] for n in range(3)]
    assert found(filled(needles, rows)) == {1: [0], 2: [1], 3: [2]}
