"""Dropout by seed on a GPU. Needs torch and Triton in this interpreter: `python -m pytest -m gpu` in the train environment."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.gpu


def test_a_mask_has_the_asked_share_and_is_its_seeds() -> None:
    """The kept elements are scaled up, and adding draws the same ones as dropping."""
    import torch

    from pipeline.finetune.dropout import add_dropped, dropped

    ones = torch.ones(300, 1111, device="cuda", dtype=torch.bfloat16)
    seed, other = torch.tensor([7, 8], device="cuda")
    once = dropped(ones, 0.25, seed)
    assert float((once == 0).float().mean()) == pytest.approx(0.25, abs=0.01)
    assert float(once.max()) == pytest.approx(1 / 0.75, rel=1e-2)
    assert torch.equal(once, dropped(ones, 0.25, seed))
    assert not torch.equal(once, dropped(ones, 0.25, other))
    to = torch.zeros_like(ones)
    add_dropped(to, ones, 0.25, seed)
    assert torch.equal(to, once)
