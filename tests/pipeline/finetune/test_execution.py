"""How a run is run, decided without torch from settings, the base's shape and the machine's figures."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from pipeline.config.schema import FinetuneConfig
from pipeline.errors import ConfigError
from pipeline.finetune import attention, execution
from pipeline.finetune.execution import Base, Execution, Machine

LLAMA = SimpleNamespace(
    model_type="llama", hidden_act="silu", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=8, vocab_size=49152,
)  # fmt: skip
BASE = Base(LLAMA, "sdpa", has_plain_head=True, has_gates=True, is_known_to_liger=True)
CPU = Machine("cpu", "cpu", "bfloat16", 2)
GPU = Machine("cuda", "a GPU", "bfloat16", 8)
GIB = 2**30


@pytest.fixture(autouse=True)
def _varlen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch whose flash kernel takes windows."""
    monkeypatch.setattr(attention, "_varlen_parameters", lambda: frozenset({"window_size"}))


def choose(
    machine: Machine, base: Base = BASE, gib: float = 100, before: Execution | None = None, **settings: object
) -> Execution:
    return execution.choose(
        FinetuneConfig(**settings), base, machine, "nf4", sequence_len=1024, free_bytes=gib * GIB, before=before
    )


def test_a_gpu_with_room_runs_everything_fused() -> None:
    """Flash attention over rows, Liger, fused LoRA and loss, CUDA graphs, no checkpointing."""
    chosen = choose(GPU)
    assert (chosen.attention, chosen.kernels) == (attention.CUDA, "liger, fused LoRA")
    assert (chosen.fused_loss, chosen.cuda_graphs, chosen.gradient_checkpointing) == (True, True, False)
    assert (chosen.shares_prefixes, chosen.split, chosen.tokens_a_pass) == (False, False, 8192)


def test_a_cpu_shares_prefixes_and_fuses_nothing() -> None:
    """Passes are short, and prompts that rows share go through the model once."""
    chosen = choose(CPU)
    assert (chosen.attention, chosen.kernels, chosen.shares_prefixes) == (attention.CPU, "torch", True)
    assert (chosen.fused_loss, chosen.cuda_graphs, chosen.tokens_a_pass) == (False, False, 1024)


@pytest.mark.parametrize(
    ("settings", "base"),
    [
        ({"num_processes": 2, "fsdp_version": 2}, {}),
        ({"lora_target_modules": ("lm_head", "q_proj")}, {}),
        ({}, {"has_plain_head": False}),
    ],
)
def test_an_output_layer_that_is_not_ours_is_left_alone(settings: dict, base: dict) -> None:
    """Split over processes, adapted, or more than one product: transformers computes the logits, and no graph is recorded."""
    chosen = choose(GPU, Base(**{**vars(BASE), **base}), **settings)
    assert (chosen.fused_loss, chosen.cuda_graphs) == (False, False)


def test_short_of_memory_layers_are_checkpointed_without_graphs() -> None:
    """`auto` checkpoints where the shortest pass would not fit otherwise."""
    chosen = choose(GPU, gib=1)
    assert (chosen.gradient_checkpointing, chosen.cuda_graphs) == (True, False)


def test_a_run_that_goes_on_keeps_what_memory_decided() -> None:
    """Under less memory than before it is cut as it was."""
    before = choose(GPU)
    assert choose(GPU, gib=1, before=before) == before


def test_float32_and_unknown_architectures_keep_their_own_attention() -> None:
    """The flash kernel takes 16 bits, windows have masks of their own, and Liger knows some models only."""
    assert choose(Machine("cuda", "an old GPU", "float32", 8)).attention == "sdpa"
    window = SimpleNamespace(**vars(LLAMA), sliding_window=512)
    chosen = choose(GPU, Base(window, "eager", has_plain_head=True, has_gates=False, is_known_to_liger=False))
    assert (chosen.attention, chosen.kernels, chosen.cuda_graphs) == ("eager", "torch, fused LoRA", False)


@pytest.mark.parametrize(
    ("settings", "device", "count", "gib", "weights"),
    [
        ({"adapter": "lora", "load_in_4bit": False}, "cpu", 0, 0, "bf16"),
        ({}, "cpu", 10**9, 4, "nf4, unpacked once"),
        ({}, "cpu", 10**9, 3, "nf4"),
        ({}, "cuda", 10**9, 36, "nf4"),
        ({}, "cuda", 10**9, 38, "nf4, unpacked once"),
        ({"bnb_4bit_quant_type": "fp4"}, "cpu", 10**9, 4, "fp4, unpacked once"),
        ({"num_processes": 2, "fsdp_version": 2}, "cuda", 10, 100, "nf4"),
    ],
)
def test_small_models_are_unpacked_once(settings: dict, device: str, count: int, gib: float, weights: str) -> None:
    """Two bytes a weight, up to half of a machine's free memory or a twentieth of a GPU's; a split base stays packed."""
    machine = Machine(device, "", "bfloat16", 1)
    assert execution.frozen_weights(FinetuneConfig(**settings), machine, count, gib * GIB) == weights


def test_weights_stay_as_a_run_began_with_them() -> None:
    """Whatever memory is free now."""
    for kept in ("nf4", "nf4, unpacked once"):
        before = Execution(**{**vars(choose(CPU)), "frozen_weights": kept})
        for gib in (0, 1000):
            assert execution.frozen_weights(FinetuneConfig(), CPU, 10**9, gib * GIB, before) == kept


def test_a_gpus_optimizer_is_refused_on_a_cpu() -> None:
    """The remedy names one that runs there."""
    settings = FinetuneConfig(optimizer="paged_adamw_8bit")
    execution.raise_for_gpu_optimizer(settings, "cuda")
    with pytest.raises(ConfigError) as raised:
        execution.raise_for_gpu_optimizer(settings, "cpu")
    assert raised.value.problems[0].remedy == "set finetune.optimizer: adamw_torch"


@pytest.mark.parametrize(
    ("rope", "by_length"),
    [
        (None, False),
        ({"rope_type": "default", "rope_theta": 10000.0}, False),
        ({"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0}, False),
        ({"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}, True),
        ({"full_attention": {"rope_type": "dynamic"}, "sliding_attention": {"rope_type": "default"}}, True),
    ],
)
def test_frequencies_that_depend_on_the_length_are_seen(rope: dict | None, by_length: bool) -> None:
    """Transformers' dynamic and longrope, for all layers or for those of one kind: no CUDA graph can hold them."""
    assert execution.rotates_by_length(SimpleNamespace(rope_parameters=rope)) is by_length
    config = SimpleNamespace(**vars(LLAMA), rope_parameters=rope)
    assert (
        choose(GPU, Base(config, "", has_plain_head=True, has_gates=True, is_known_to_liger=True)).cuda_graphs
        is not by_length
    )
