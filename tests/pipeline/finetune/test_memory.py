"""How much goes through the model at once, and the bytes of each term."""

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


def passes(
    gib: float, tokens: int, sequence_len: int = 1024, device: str = "cuda", *, fused_loss: bool = False,
    has_gates: bool = False, **settings: object,
) -> tuple[bool, int]:  # fmt: skip
    """The decision where so much memory is left beside the weights."""
    return memory.passes(
        FinetuneConfig(**settings), LLAMA, device, tokens=tokens, sequence_len=sequence_len, free_bytes=gib * GIB,
        fused_loss=fused_loss, has_gates=has_gates,
    )  # fmt: skip


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
def test_a_batch_is_passed_in_parts_before_layers_are_computed_twice(gib, tokens, checkpointed, a_pass) -> None:
    """Whole where it fits, in passes of 1024 tokens and more where not, checkpointed only below that."""
    found = passes(gib, tokens)
    assert found[0] is checkpointed
    assert found[1] == pytest.approx(a_pass, rel=0.02)
    assert checkpointed or found[1] % 256 == 0


def test_what_is_computed_again_leaves_room_for_more_tokens() -> None:
    """A gated block's product and a fused loss's logits aren't kept."""
    found = passes(10, 4096, fused_loss=True, has_gates=True)
    fits = 8 * GIB / (32 * 2 * (6 * 4096 + 2 * 1024 + 2 * 14336))
    assert found == (False, fits // 256 * 256)


def test_a_pass_still_fits_when_it_is_padded() -> None:
    """Above 4096 tokens a CUDA graph's shapes are 1024 tokens apart, so a limit between two of them is the lower one."""
    bytes_a_token = memory.bytes_a_token(LLAMA, checkpointing=False)
    for fits, limit in ((4095, 3840), (4097, 4096), (5119, 4096), (5121, 5120)):
        gib = fits * bytes_a_token / 0.8 / GIB + 1e-6
        assert passes(gib, 16384) == (False, limit)


def test_what_the_config_says_about_checkpointing_stands() -> None:
    """It is asked for, or forbidden, whatever fits."""
    assert passes(130, 4096, gradient_checkpointing=True) == (True, 4096)
    assert passes(5, 4096, gradient_checkpointing=False) == (False, 1024)


def test_a_small_batch_is_one_pass() -> None:
    """A whole batch that is shorter than a pass need not be checkpointed either."""
    assert passes(3, 256, 256) == (False, 256)


def test_on_a_cpu_passes_are_short() -> None:
    """The cache is what counts there, not memory."""
    assert passes(0, 8192, 512, "cpu") == (False, 1024)
    assert passes(0, 8192, 2048, "cpu") == (False, 2048)


def test_the_remedy_for_too_little_memory_keeps_the_effective_batch() -> None:
    """Half the micro batch or less, by a divisor of the batch; with one row a pass, shorter rows."""
    remedy = memory.smaller(FinetuneConfig(micro_batch_size=6, gradient_accumulation_steps=2))
    assert "micro_batch_size: 3 and finetune.gradient_accumulation_steps: 4" in remedy
    assert "gradient_checkpointing: true" in remedy
    assert "more finetune.num_processes and finetune.fsdp_version: 2" in remedy
    odd = memory.smaller(FinetuneConfig(micro_batch_size=5))
    assert "micro_batch_size: 1 and finetune.gradient_accumulation_steps: 5" in odd
    one = FinetuneConfig(micro_batch_size=1, gradient_checkpointing=True, num_processes=2, fsdp_version=2)
    assert memory.smaller(one) == "lower data.sequence_len"


def test_the_adapter_is_a_pair_around_each_of_seven_layers() -> None:
    """Sixteen bytes for each of r · (inputs + outputs) parameters: Llama 3 8B with r 16 has 41.9 million."""
    assert memory.adapter_bytes(LLAMA, FinetuneConfig(lora_r=16)) == 16 * 41_943_040


@pytest.mark.parametrize(
    ("settings", "bytes_a_weight"),
    [
        ({"adapter": "lora", "load_in_4bit": False}, 2),
        ({"bnb_4bit_use_double_quant": False}, 0.5625),
        ({}, 0.5 + 1 / 64 + 1 / 4096),
    ],
)
def test_only_the_decoder_is_in_four_bits(settings: dict, bytes_a_weight: float) -> None:
    """Embeddings and output layer stay in 16 bits: two of them, or one that is both."""
    decoder, embedding = 7_000_000_000, 49152 * 4096
    for tied, count in ((False, 2), (True, 1)):
        config = SimpleNamespace(**vars(LLAMA), tie_word_embeddings=tied)
        frozen = memory.frozen_bytes(config, decoder + count * embedding, FinetuneConfig(**settings))
        assert frozen == pytest.approx(decoder * bytes_a_weight + count * embedding * 2, rel=1e-9)


def test_a_split_base_is_a_part_two_layers_and_the_rest() -> None:
    """Of 32 layers of 10 bytes, over 4 processes, with 7 bytes of embeddings."""
    assert memory.split_bytes(320, 7, 32, 4) == 80 + 20 + 7
