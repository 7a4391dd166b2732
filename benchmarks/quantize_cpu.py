"""AWQ on this CPU: computed in float32 against the stored bf16, by pipeline.quantize.llmcompressor or autoawq.

    python benchmarks/quantize_cpu.py [--avx2] [--method llmcompressor] [--layers 2] [--samples 32] [--tokens 128] [--rounds 3]
        [--threads 2] [--smoke]

Runs in the train environment, or with `--method autoawq` in the autoawq one. The model has SmolLM2-135M's layers with
random weights: hidden 576, inner 1536, 9 heads, 3 of them for keys. `--smoke` takes one narrow layer and one round. Both
sides quantize it with the stage's own calls and settings for a CPU:

  bfloat16   computed in the dtype that the model is stored in
  float32    computed in float32, stored in bf16: the stage's choice where the CPU has no bf16

`--avx2` keeps torch and oneDNN to AVX2, as on a CPU that has nothing more. The sides take turns, each time in a process
of its own. Prints each side's median seconds to load, to quantize and to check, the ratio, and how near the results come
to their original. Quantizing is told in CPU seconds too: on a busy machine, with `--threads 1`, they say more. Ends with
an error unless both sides wrote the same tensors in the same dtypes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from pipeline import compute_dtype
from pipeline.model import weights
from pipeline.quantize import autoawq, check, llmcompressor
from pipeline.quantize.calibration import PROBE_TOKENS, Sample

SEED = 1
VOCABULARY = 512
GROUP_SIZE = 64
SIDES = ("bfloat16", "float32")
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
BACKENDS: dict[str, ModuleType] = {"llmcompressor": llmcompressor, "autoawq": autoawq}
GRID = {"llmcompressor": {"zero_point": True, "observer": "memoryless_minmax"}, "autoawq": {"zero_point": True}}
PARTS = ("load", "quantize", "cpu", "check")


def make(folder: Path, layers: int, narrow: bool) -> None:
    """The model, in bf16."""
    hidden, inner, heads, keys = (128, 256, 2, 1) if narrow else (576, 1536, 9, 3)
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=keys, max_position_embeddings=2048, tie_word_embeddings=True,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Quantize and check on one side, as the stage does: seconds by part, and how near the result comes."""
    torch.set_num_threads(options.threads)
    dtype: torch.dtype = getattr(torch, options.side)
    compute_dtype.of_device = lambda _device: dtype
    backend, folder = BACKENDS[options.method], options.out / options.side
    folder.mkdir(exist_ok=True)
    order = random.Random(SEED)
    samples = [order.choices(range(VOCABULARY), k=options.tokens) for _ in range(options.samples)]
    probe = [Sample(tuple(samples[0][:PROBE_TOKENS]))]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"?": 0}, unk_token="?")))
    clock = [time.perf_counter()]
    model = backend.load(options.out / "model", options.out)
    clock.append(time.perf_counter())
    if model.dtype != dtype:
        raise SystemExit(f"the model was loaded to compute in {model.dtype}")
    original = check.read(model, probe)
    clock.append(time.perf_counter())
    cpu_seconds = time.process_time()
    quantization = backend.quantize(
        model, tokenizer, samples, group_size=GROUP_SIZE, folder=folder, on_layer=lambda *_: None,
        **GRID[options.method], **backend.EFFORT["cpu"],
    )  # fmt: skip
    cpu_seconds = time.process_time() - cpu_seconds
    clock.append(time.perf_counter())
    compared = check.compare(backend.load(options.out / "model", options.out), folder, probe, original)
    clock.append(time.perf_counter())
    loading, reading, quantizing, comparing = (after - before for before, after in pairwise(clock))
    return {
        "load": loading,
        "quantize": quantizing,
        "cpu": cpu_seconds,
        "check": reading + comparing,
        "format": quantization["quant_method"],
        "perplexities": [original.perplexity, compared.perplexity],
        "layer_errors": compared.layer_errors,
    }


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--avx2", action="store_true", help="as on a CPU with AVX2 alone")
    parser.add_argument("--method", choices=BACKENDS, default="llmcompressor")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--smoke", action="store_true", help="one narrow layer, 4 samples of 32 tokens, one round")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.smoke:
        options.layers, options.samples, options.tokens, options.rounds = 1, 4, 32, 1
    return options


def child(options: argparse.Namespace, side: str, out: Path) -> dict[str, Any]:
    """One side's figures, from a process of its own."""
    command = [sys.executable, *sys.argv, "--side", side, "--out", str(out)]
    environ = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **(AVX2 if options.avx2 else {})}
    ended = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise SystemExit(f"{side}: {ended.stderr[-3000:]}")
    figures: dict[str, Any] = json.loads((out / f"{side}.json").read_text(encoding="utf-8"))
    return figures


def headers(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of each tensor in the folder."""
    return {name: (tensor.dtype, tensor.shape) for name, tensor in weights.tensors(folder).items()}


def compare(options: argparse.Namespace, out: Path) -> None:
    """Both sides in turn, then their table."""
    make(out / "model", options.layers, options.smoke)
    rounds = [{side: child(options, side, out) for side in SIDES} for _ in range(options.rounds)]
    vectors = "AVX2 alone" if options.avx2 else torch.backends.cpu.get_cpu_capability()
    print(f"{options.method}, torch {torch.__version__}, {vectors}, threads: {options.threads}, layers: {options.layers}, "
          f"samples: {options.samples} of {options.tokens} tokens, rounds: {options.rounds}")  # fmt: skip
    seconds = {
        side: {part: statistics.median(figures[side][part] for figures in rounds) for part in PARTS} for side in SIDES
    }
    for side in SIDES:
        figures, median = rounds[-1][side], seconds[side]
        before, after = figures["perplexities"]
        print(
            f"{side:<9} load {median['load']:.1f} s, quantize {median['quantize']:.1f} s "
            f"({median['quantize'] / options.layers:.2f} a layer, {median['cpu']:.1f} s of CPU), check {median['check']:.1f} s; "
            f"layer errors up to {max(figures['layer_errors']):.4f}, perplexity {before:.1f} -> {after:.1f}"
        )
    for part, meaning in (("quantize", "seconds"), ("cpu", "CPU seconds")):
        ratios = [figures["bfloat16"][part] / figures["float32"][part] for figures in rounds]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(f"quantize, by {meaning}: float32 is {statistics.median(ratios):.2f} times as fast ({spread})")
    if headers(out / SIDES[0]) != headers(out / SIDES[1]):
        raise SystemExit("the sides wrote other tensors or dtypes")
    print(f"both wrote the same {len(headers(out / SIDES[0]))} tensors in the same dtypes")


def main() -> None:
    """Measure one side, or start both."""
    options = arguments()
    if options.side:
        figures = measure(options)
        (options.out / f"{options.side}.json").write_text(json.dumps(figures), encoding="utf-8")
        return
    with tempfile.TemporaryDirectory() as out:
        compare(options, Path(out))


if __name__ == "__main__":
    main()
