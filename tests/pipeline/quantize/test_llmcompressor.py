"""pipeline.quantize.llmcompressor against llm-compressor left as it is: benchmarks/quantize_cuda.py on a tiny model.

The test on a GPU needs llm-compressor in this interpreter: `python -m pytest -m gpu` in the train environment.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.programs import TESTS, python

BENCHMARK = TESTS.parent / "benchmarks" / "quantize_cuda.py"
SAMPLES = ("--samples", "12", "--tokens", "64")
UNEVEN = "import sys; sys.path[0] = sys.argv[1]; from proofs.quantize_proofs import Path, make; make(Path(sys.argv[2]))"


def measured(folder: Path) -> dict[str, Any]:
    """What the benchmark wrote."""
    return {file.stem: json.loads(file.read_text()) for file in folder.glob("*.json")}


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("lengths", "compute", "sums_apart"),
    [((), "bfloat16", 0.02), (("--shortest", "20"), "bfloat16", 0.02), (("--shortest", "20"), "float32", 1e-4)],
    ids=["one length", "many lengths", "in float32"],
)
def test_batches_quantize_as_plain_llm_compressor_does(tmp_path, lengths, compute, sums_apart):
    """Four to twelve samples a batch, padded or not: the same weights as one sample at a time by the plain recipe."""
    python(UNEVEN, TESTS, tmp_path / "model")
    options = (*SAMPLES, *lengths, "--compute", compute, "--batch-tokens", "256", "--out", tmp_path / "out")
    told = python(BENCHMARK, tmp_path / "model", *options, PYTHONPATH=str(TESTS.parent))
    found = measured(tmp_path / "out")
    assert "ours against plain: 0.00% of weights in another place" in told
    assert found["compared"]["ours"]["matrices"] == 14
    assert found["compared"]["ours"]["largest_of_norm"] < 1e-6
    assert 0 < found["compared"]["ours"]["largest_of_error"] < sums_apart, (
        "plain sums its losses in the dtype it computes in, ours in float32"
    )
    assert found["ours"]["errors"].keys() == found["plain"]["errors"].keys()
    assert len(found["ours"]["errors"]) == 6
    assert all(
        found["ours"]["seconds"][part] > 0 for part in ("load", "forward", "search", "quantize", "save", "check")
    )


@pytest.mark.gpu
@pytest.mark.timeout(600)
def test_on_a_gpu_it_quantizes_as_plain_llm_compressor_does(tmp_path):
    """Both with the model on the GPU, where both pack alike; a product summed in another order may move a tie."""
    pytest.importorskip("llmcompressor")
    environment = {**os.environ, "PYTHONPATH": ":".join([str(TESTS.parent), *sys.path]), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", UNEVEN, TESTS, tmp_path / "model"], env=environment, check=True)
    options = [*SAMPLES, "--shortest", "20", "--sides", "plain-gpu,ours", "--out", tmp_path / "out"]
    subprocess.run([sys.executable, BENCHMARK, tmp_path / "model", *options], env=environment, check=True)
    found = measured(tmp_path / "out")
    assert found["ours"]["peak_gib"] > 0
    assert found["compared"]["ours"]["largest_of_error"] < 0.02
    assert found["compared"]["ours"]["median_of_norm"] < 1e-3
    assert found["compared"]["ours"]["share_moved"] < 0.01
