"""pipeline.quantize.autoawq on a GPU, in the autoawq environment.

test_quantize.py has its pure functions, test_quantize_batches.py what it asks a GPU, test_awq.py runs it on a CPU.
"""

from __future__ import annotations

import json

import pytest
from support.programs import TESTS, python

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(580)]

QUANTIZE = {"method": "autoawq", "num_calibration_samples": 8, "max_calibration_tokens": 48}
SENTENCE = "my card was charged twice for order A-1042 please refund the second payment of 19.99 to my account"
STAGE = """
import json, sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[4])
from proofs import quantize_proofs
from pipeline.quantize import quantize
from pipeline.quantize import autoawq as quantize_autoawq
folder, asked, few = Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])
quantize_proofs.make(folder / "merge" / "payload")
if few:
    quantize_autoawq._at_once = lambda *_: few
detail = quantize.run(quantize_proofs.request(folder, "autoawq", "first", {"model": "merge", "quantize": asked}))
print(json.dumps({**detail, "peak": torch.cuda.max_memory_allocated()}))
"""


@pytest.mark.parametrize("few", [0, 3], ids=["all blocks at once", "three at once"])
def test_on_a_gpu_the_result_is_near_the_original(tmp_path, few):
    """The stage's own check passes, every layer's error is one of rounding, and the work was done on the GPU."""
    (tmp_path / "prepare" / "payload").mkdir(parents=True)
    (tmp_path / "autoawq").mkdir()
    lines = [json.dumps({"text": SENTENCE[number:]}) + "\n" for number in range(12)]
    (tmp_path / "prepare" / "payload" / "calibration.jsonl").write_text("".join(lines))
    told = python(STAGE, tmp_path, json.dumps(QUANTIZE), str(few), TESTS, environment="autoawq")
    detail = json.loads(told.splitlines()[-1])
    assert detail["effort"]["search_tokens"] > 2048
    assert detail["peak"] > 0
    assert 0.05 < max(detail["layer_errors"]) < 0.4
