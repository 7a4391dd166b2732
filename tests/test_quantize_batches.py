"""pipeline.quantize_batches: how many tokens a batch may have, and which samples share one."""

from __future__ import annotations

import random

import pytest

from pipeline.quantize_batches import MOST_TOKENS, Shape, batch_tokens, cut

LLAMA = Shape(4096, 14336, 32)
GIB = 2**30


@pytest.mark.parametrize(("free", "tokens"), [(60, MOST_TOKENS), (15, MOST_TOKENS), (10, 0)])
def test_batches_are_as_large_as_memory_allows(free, tokens):
    """128 samples of 512 tokens of an 8 B Llama: the largest batch on a large GPU, a sample at a time on a small one."""
    assert batch_tokens(LLAMA, [512] * 128, free * GIB) == tokens


def test_between_large_and_small_a_batch_grows_with_memory():
    """Never below two samples, never above the most, and what is counted stays within what is free."""
    found = [batch_tokens(LLAMA, [512] * 128, free / 4 * GIB) for free in range(40, 100)]
    assert found == sorted(found)
    assert len(set(found)) > 4
    for tokens, free in zip(found, range(40, 100), strict=True):
        assert tokens == 0 or tokens >= 1024
        assert tokens * LLAMA.passing(512) + LLAMA.kept(512 * 128) < free / 4 * GIB


def test_fewer_samples_leave_more_room():
    """What is kept of all samples is subtracted first."""
    assert batch_tokens(LLAMA, [512] * 128, 12 * GIB) < batch_tokens(LLAMA, [512] * 16, 12 * GIB)


def test_every_sample_is_in_one_batch_within_the_budget():
    """Padding counts; samples of about one length stand together."""
    order = random.Random(3)
    lengths = [order.randint(1, 100) for _ in range(57)]
    batches = cut(lengths, 300)
    assert sorted(at for batch in batches for at in batch) == list(range(57))
    assert all(len(batch) * max(lengths[at] for at in batch) <= 300 for batch in batches)
    padded = sum(len(batch) * max(lengths[at] for at in batch) for batch in batches)
    assert padded < 1.2 * sum(lengths)


def test_without_a_budget_samples_keep_their_order():
    """Where no batch fits, nothing changes."""
    assert cut([3, 9, 1], 0) == [[0], [1], [2]]


def test_a_sample_above_the_budget_stands_alone():
    """It can't be cut here."""
    assert cut([9, 50, 9], 20) == [[1], [0, 2]]
