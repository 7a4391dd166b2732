"""How much goes through the model at once; the model itself is tested by test_finetune.py and test_finetune_lora.py."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from pipeline.config.schema import FinetuneConfig
from pipeline.finetune import memory

GIB = 2**30
LLAMA = SimpleNamespace(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
    vocab_size=49152,
)  # fmt: skip


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch):
    """Say how much memory the GPU has left."""

    def say(gib: float) -> None:
        monkeypatch.setattr(memory, "free", lambda _device: gib * GIB)

    return say


@pytest.mark.parametrize(
    ("gib", "tokens", "checkpointed", "a_pass"),
    [
        (130, 8 * 1024, False, 8 * 1024),
        (130, 64 * 1024, False, 16384),
        (10, 4 * 1024, False, 1536),
        (5, 4 * 1024, True, 4096),
        (0.3, 4 * 1024, True, 1024),
    ],
)
def test_a_batch_is_passed_in_parts_before_layers_are_computed_twice(free, gib, tokens, checkpointed, a_pass) -> None:
    """Whole where it fits, in passes of 1024 tokens and more where not, checkpointed only below that."""
    free(gib)
    found = memory.passes(FinetuneConfig(), LLAMA, "cuda", tokens, 1024)
    assert found[0] is checkpointed
    assert found[1] == pytest.approx(a_pass, rel=0.02)
    assert checkpointed or found[1] % 256 == 0


def test_what_is_computed_again_leaves_room_for_more_tokens(free) -> None:
    """A gated block's product and a fused loss's logits aren't kept."""
    free(10)
    found = memory.passes(FinetuneConfig(), LLAMA, "cuda", 4096, 1024, fused_loss=True, gated=True)
    fits = 8 * GIB / (32 * 2 * (6 * 4096 + 2 * 1024 + 2 * 14336))
    assert found == (False, fits // 256 * 256)


def test_a_pass_still_fits_when_it_is_padded(free) -> None:
    """Above 4096 tokens a CUDA graph's shapes are 1024 tokens apart, so a limit between two of them is the lower one."""
    bytes_a_token = memory.bytes_a_token(LLAMA, checkpointed=False)
    for fits, limit in ((4095, 3840), (4097, 4096), (5119, 4096), (5121, 5120)):
        free(fits * bytes_a_token / 0.8 / GIB + 1e-6)
        assert memory.passes(FinetuneConfig(), LLAMA, "cuda", 16384, 1024) == (False, limit)


def test_what_the_config_says_about_checkpointing_stands(free) -> None:
    """It is asked for, or forbidden, whatever fits."""
    free(130)
    assert memory.passes(FinetuneConfig(gradient_checkpointing=True), LLAMA, "cuda", 4096, 1024) == (
        True,
        4096,
    )
    free(5)
    never = FinetuneConfig(gradient_checkpointing=False)
    assert memory.passes(never, LLAMA, "cuda", 4096, 1024) == (False, 1024)


def test_a_small_batch_is_one_pass(free) -> None:
    """A whole batch that is shorter than a pass need not be checkpointed either."""
    free(3)
    assert memory.passes(FinetuneConfig(), LLAMA, "cuda", 256, 256) == (False, 256)


def test_on_a_cpu_passes_are_short(free) -> None:
    """The cache is what counts there, not memory."""
    assert memory.passes(FinetuneConfig(), LLAMA, "cpu", 8192, 512) == (False, 1024)
    assert memory.passes(FinetuneConfig(), LLAMA, "cpu", 8192, 2048) == (False, 2048)
