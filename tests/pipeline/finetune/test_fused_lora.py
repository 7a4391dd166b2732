"""The fused LoRA layer against peft's own, on a tiny NF4 model in the train environment."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from support import programs

from pipeline.environments import interpreters

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def proofs(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The figures of tests/proofs/lora_proofs.py."""
    base = tmp_path_factory.mktemp("lora") / "base"
    programs.tiny(base)
    train = interpreters.find("train")
    ended = subprocess.run(
        [train.interpreter, Path(__file__).parents[2] / "proofs" / "lora_proofs.py", base],
        env=interpreters.child_environ(train), stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return json.loads(ended.stdout.splitlines()[-1])


def test_the_backward_pass_is_the_derivative_of_the_forward_pass(proofs: dict) -> None:
    """With dropout and without, by finite differences in float64."""
    assert proofs["derivative"] == [True, True]


def test_it_computes_what_peft_computes(proofs: dict) -> None:
    """The same loss and gradients as peft's layers around the same NF4 weights."""
    plain, fused = proofs["loss"]
    assert fused == pytest.approx(plain, rel=1e-6)
    assert proofs["gradients_apart"] < 1e-5


def test_dropout_drops_and_draws_the_same_again_under_checkpointing(proofs: dict) -> None:
    """A layer that is computed a second time for its gradient has the same mask; evaluation has none."""
    dropped = proofs["dropped"]
    assert dropped["once"] != pytest.approx(dropped["without"], rel=1e-4)
    assert dropped["checkpointed"] == dropped["once"]
    assert proofs["checkpointed_apart"] < 1e-6
    assert dropped["off"] == pytest.approx(dropped["without"], rel=1e-6)


def test_a_mask_is_its_seeds(proofs: dict) -> None:
    """The asked share is dropped, the rest scaled up; another seed is another mask."""
    share, scale = proofs["mask"]
    assert share == pytest.approx(0.3, abs=0.015)
    assert scale == pytest.approx(1 / 0.7, rel=1e-6)
    assert proofs["masks_equal"] == [True, False]
