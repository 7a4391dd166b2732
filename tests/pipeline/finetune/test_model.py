"""An Execution applied to a model; loading, LoRA and unpacking are tested by test_train.py, test_fsdp.py and test_fused_lora.py."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from pipeline.finetune import attention, model
from pipeline.finetune.execution import Execution

PLAIN = Execution(
    device="cpu", name="cpu", dtype="bfloat16", threads=1, attention="sdpa", shares_prefixes=False, kernels="torch",
    fused_loss=False, cuda_graphs=False, frozen_weights="nf4", gradient_checkpointing=False, tokens_a_pass=1024,
)  # fmt: skip


class Base:
    """A model that remembers its attention, with an output layer that doubles."""

    def __init__(self) -> None:
        self.attention: str | None = None
        self.head = SimpleNamespace(forward=lambda states: 2 * states)

    def set_attn_implementation(self, name: str) -> None:
        """As transformers' models have it."""
        self.attention = name

    def get_output_embeddings(self) -> SimpleNamespace:
        """As transformers' models have it."""
        return self.head


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch) -> Base:
    monkeypatch.setattr(attention, "register", lambda: None)
    return Base()


@pytest.mark.parametrize("name", [attention.CPU, attention.CUDA])
def test_attention_over_rows_is_set(base: Base, name: str) -> None:
    """The two that are ours, which `register` made known."""
    model.apply(base, Execution(**{**vars(PLAIN), "attention": name}))
    assert base.attention == name


def test_a_models_own_attention_and_output_layer_stay(base: Base) -> None:
    """Setting its own anew could change its masks."""
    model.apply(base, PLAIN)
    assert base.attention is None
    assert base.head.forward(3) == 6


def test_a_fused_loss_gets_hidden_states(base: Base) -> None:
    """The output layer hands its input on."""
    model.apply(base, Execution(**{**vars(PLAIN), "fused_loss": True}))
    assert base.head.forward(3) == 3
