"""Checkpoints whose optimizer keeps its state in a form of its own; whole runs are killed and resumed by test_train.py."""

from __future__ import annotations

import json

import pytest
from support import programs

pytestmark = pytest.mark.slow

ROUND_TRIP = """
import json, sys
from pathlib import Path
import bitsandbytes, torch
from pipeline.finetune import checkpoints

def made():
    weight = torch.nn.Parameter(torch.ones(8192))
    return weight, bitsandbytes.optim.AdamW([weight], lr=1e-3, optim_bits=8)

def state_of():
    return {
        "step": 3, "state1": torch.arange(8192).remainder(200).to(torch.uint8), "state2": torch.full((8192,), 7, dtype=torch.uint8),
        "qmap1": torch.linspace(-1, 1, 256), "qmap2": torch.linspace(0, 1, 256),
        "absmax1": torch.rand(32), "absmax2": torch.rand(32),
    }

weight, optimizer = made()
optimizer.state[weight] = kept = state_of()
folder = Path(sys.argv[1])
checkpoints.save(folder, checkpoints.State(step=3, tokens=5), {"a": weight}, optimizer)
other, resumed = made()
with torch.no_grad():
    other.zero_()
state = checkpoints.resume(folder, {"a": other}, resumed)
found = resumed.state[other]
print(json.dumps({
    "step": state.step,
    "weight": bool(torch.equal(weight, other)),
    "same": {name: bool(torch.equal(torch.as_tensor(value), torch.as_tensor(found[name]))) for name, value in kept.items()},
    "dtypes": [str(found["state1"].dtype), str(found["absmax1"].dtype)],
    "keys": sorted(found),
}))
"""


def test_states_of_eight_bits_come_back_as_they_were(tmp_path) -> None:
    """Bitsandbytes' own state_dict nests their tensors; a checkpoint holds them flat, and nothing is cast."""
    found = json.loads(programs.python(ROUND_TRIP, tmp_path))
    assert found["step"] == 3
    assert found["weight"]
    assert set(found["same"].values()) == {True}
    assert found["dtypes"] == ["torch.uint8", "torch.float32"]
    assert found["keys"] == ["absmax1", "absmax2", "qmap1", "qmap2", "state1", "state2", "step"]
