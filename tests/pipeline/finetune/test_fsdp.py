"""The bytes of a split base; test_distributed.py tests that it trains as a whole one does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import programs


@pytest.mark.slow
def test_a_part_of_the_packed_weights_is_a_process_share(tmp_path: Path):
    """Packing as bfloat16 keeps the values of bitsandbytes' bytes, and the estimate falls with the number of processes."""
    programs.tiny(tmp_path / "base")
    found = json.loads(programs.python(PROOF, tmp_path / "base").splitlines()[-1])
    assert found["difference"] == 0
    assert found["layers"] == 2
    assert found["packed"] == pytest.approx(found["estimate"], rel=0.02)
    alone, two, four = found["bytes"]
    assert alone > two > four
    assert alone - two == pytest.approx(2 * (two - four), abs=3)
    assert "doesn't name the layers" in found["refused"]


@pytest.mark.slow
def test_fused_layers_work_on_a_split_base(tmp_path: Path):
    """A GPU's run (fused LoRA over NF4, checkpointed) gives the whole base's losses, gradients and adapter, in half the weights."""
    programs.tiny(tmp_path / "base")
    said = programs.python(
        programs.TESTS / "proofs" / "split_proofs.py", tmp_path / "base", ATEN_CPU_CAPABILITY="default"
    )
    whole, split = json.loads(said.splitlines()[-1])
    assert whole["dtype"] == split["dtype"] == "float32"
    for name in ("history", "weights"):
        assert flat(split[name]) == pytest.approx(flat(whole[name]), rel=1e-4)
    assert whole["history"][1] != whole["history"][0]
    assert split["held"] < 0.55 * whole["held"]


def flat(numbers: list) -> list[float]:
    return [it for some in numbers for it in (some if isinstance(some, list) else [some])]


PROOF = """
import json, sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM
from pipeline.finetune import fused_lora
from pipeline.finetune import model as finetune_model
from pipeline.finetune import fsdp
from pipeline.config.schema import FinetuneConfig
from pipeline.errors import ModelError
base, settings = Path(sys.argv[1]), FinetuneConfig()
load = AutoModelForCausalLM.from_pretrained
ours = load(base, dtype=torch.bfloat16)
fsdp.pack(ours, settings, torch.bfloat16)
estimates = [fsdp.bytes_a_process(ours, settings, processes) for processes in (1, 2, 4)]
layers = fsdp.layers(ours)
estimate = sum(fsdp._bytes(it, settings) for it in layers[0].parameters())
for layer in layers:
    layer.to("cpu")
theirs = load(base, dtype=torch.bfloat16, quantization_config=finetune_model.four_bit(settings, torch.bfloat16))
pairs = [(one, other) for one, other in zip(ours.modules(), theirs.modules()) if type(one).__name__ == "Linear4bit"]
assert len(pairs) == 14, len(pairs)
assert all(one.weight.dtype == torch.bfloat16 and other.weight.dtype == torch.uint8 for one, other in pairs)
apart = [fused_lora.weight_of(one, torch.bfloat16) - fused_lora.weight_of(other, torch.bfloat16) for one, other in pairs]
def state_bytes(state):
    return state.absmax.nbytes + state.state2.absmax.nbytes
packed = sum(it.nbytes for it in layers[0].parameters())
packed += sum(state_bytes(it.quant_state) for it in layers[0].modules() if type(it).__name__ == "Linear4bit")
try:
    fsdp.layers(torch.nn.Linear(2, 2))
    refused = ""
except ModelError as error:
    refused = str(error)
print(json.dumps({"difference": max(float(it.abs().max()) for it in apart), "layers": len(layers), "packed": packed,
                  "estimate": estimate, "bytes": estimates, "refused": refused}))
"""
