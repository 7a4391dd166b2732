"""pipeline.quantize.batches: how many tokens a batch may have, and which samples share one."""

from __future__ import annotations

import random
import sys
from types import SimpleNamespace

import pytest

from pipeline.quantize import autoawq, llmcompressor
from pipeline.quantize.batches import MOST_TOKENS, Shape, batch_tokens, cut

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


class Model:
    """An 8 B Llama's config, on a GPU of which it takes 15 GiB, or on the CPU; so much is free beside it."""

    config = SimpleNamespace(hidden_size=4096, intermediate_size=14336, num_attention_heads=32)

    def __init__(self, device: str, free: float) -> None:
        self.device, self.free = SimpleNamespace(type=device), free

    def to(self, device: str) -> None:
        """Give the GPU back what it took."""
        self.device, self.free = SimpleNamespace(type=device), self.free + 15

    def placed(self, monkeypatch: pytest.MonkeyPatch, *, gpu: bool = True) -> Model:
        """The torch that is imported sees this GPU."""
        cuda = SimpleNamespace(
            is_available=lambda: gpu, empty_cache=lambda: None, mem_get_info=lambda: (int(self.free * GIB), 80 * GIB)
        )
        monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
        return self


@pytest.mark.parametrize(
    ("device", "free", "tokens", "ends"),
    [
        ("cuda", 60, MOST_TOKENS, "cuda"),
        ("cuda", 8, MOST_TOKENS, "cpu"),
        ("cpu", 22, MOST_TOKENS, "cpu"),
        ("cpu", 8, 0, "cpu"),
    ],
)
def test_a_model_without_room_beside_it_leaves_the_gpu(monkeypatch, device, free, tokens, ends):
    """Batches come first: they save more than the model's way to the GPU and back costs."""
    model = Model(device, free).placed(monkeypatch)
    assert llmcompressor._place(model, [[1] * 512] * 128) == tokens
    assert model.device.type == ends


def test_without_a_gpu_it_is_a_sample_at_a_time(monkeypatch):
    """As it always was on a CPU."""
    assert llmcompressor._place(Model("cpu", 0).placed(monkeypatch, gpu=False), [[1] * 512] * 128) == 0


@pytest.mark.parametrize(("free", "gpu", "blocks"), [(60, True, None), (22, True, 73), (8, True, 1), (0, False, None)])
def test_autoawq_takes_the_blocks_that_there_is_room_for(monkeypatch, free, gpu, blocks):
    """All at once where they fit or there is no GPU, never none; of 22 GiB, (15.4 - 5.25 - 1.78) GiB by 116 MiB a block."""
    model = Model("cpu", free).placed(monkeypatch, gpu=gpu)
    found = autoawq._at_once(model, [[1] * 512] * 128)
    assert found == blocks
