"""Training speed on this CPU: packed rows as pipeline.finetune.train trains them, against plain padded batches.

    python benchmarks/finetune_cpu.py BASE TRAIN.jsonl [--rows 24] [--steps 3] [--threads 2]

Runs in the train environment; BASE is a Hugging Face folder, TRAIN.jsonl has prepared rows. Both sides
train the same rows with the same NF4 base, LoRA on every linear layer, dropout 0.05 and AdamW. The padded
side is what transformers, peft and bitsandbytes do when put together plainly: bf16 autocast, sdpa, rows
padded to the longest, logits at every token, NF4 unpacked in each pass. Prints tokens/s (padding doesn't
count), each side's best step.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.helpers import disable_input_dtype_casting
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.config.schema import FinetuneConfig
from pipeline.finetune import checkpoints, train
from pipeline.finetune import model as finetune_model
from pipeline.finetune import rows as finetune_rows
from pipeline.finetune.packing import IGNORED, Row, encode

SEQUENCE_LEN = 1024
SETTINGS = FinetuneConfig(micro_batch_size=1, logging_steps=1_000_000)


def packed(base: Path, rows: list[Row]) -> Callable[[], None]:
    """One optimizer step of pipeline.finetune.train over the rows."""
    train.keep_freed_memory()
    model, execution = finetune_model.load(base, SETTINGS, SEQUENCE_LEN)
    model = finetune_model.with_lora(model, SETTINGS, execution, "0" * 64, seed=1)
    run = train.Training(
        model, execution, SETTINGS, finetune_rows.Rows(rows, [], 0, 0),
        sequence_len=SEQUENCE_LEN, seed=1, folder=Path(tempfile.gettempdir()),
    )  # fmt: skip

    def step() -> None:
        with disable_input_dtype_casting(model):
            run.step(checkpoints.State(), range(len(rows)))

    return step


def padded(base: Path, rows: list[Row], batch: int = 8) -> Callable[[], None]:
    """One optimizer step over the rows in padded batches."""
    four = finetune_model.four_bit(SETTINGS, torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, quantization_config=four)
    config = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted: Any = get_peft_model(model, config).train()
    weights = [weight for weight in adapted.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-4)

    def step() -> None:
        for start in range(0, len(rows), batch):
            some = rows[start : start + batch]
            longest = max(len(row.input_ids) for row in some)
            ids = torch.tensor([[*row.input_ids, *[0] * (longest - len(row.input_ids))] for row in some])
            labels = torch.tensor([[*row.labels, *[IGNORED] * (longest - len(row.labels))] for row in some])
            seen = torch.tensor([[1] * len(row.input_ids) + [0] * (longest - len(row.input_ids)) for row in some])
            with torch.autocast("cpu", torch.bfloat16):
                adapted(input_ids=ids, attention_mask=seen, labels=labels, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def best(step: Callable[[], None], steps: int) -> tuple[float, float]:
    """Seconds of the quickest step, and CPU seconds of the one that took fewest; the first isn't counted."""
    step()
    walls, cpus = [], []
    for _ in range(steps):
        wall, cpu = time.perf_counter(), time.process_time()
        step()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return min(walls), min(cpus)


def main() -> None:
    """Time both sides."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("train", type=Path)
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=("packed", "padded"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    with args.train.open(encoding="utf-8") as lines:
        chosen = (json.loads(line) for line in islice(lines, args.rows))
        ends = finetune_rows.end_tokens(args.base, tokenizer)
        rows = list(encode(chosen, tokenizer, end_tokens=ends, sequence_len=SEQUENCE_LEN))
    tokens = sum(len(row.input_ids) for row in rows)
    trained = sum(row.trained for row in rows)
    print(f"{len(rows)} rows, {tokens} tokens, {trained} of them trained, {args.threads} threads")
    for name, side in (("padded", padded), ("packed", packed)):
        if args.only in (None, name):
            wall, cpu = best(side(args.base, rows), args.steps)
            print(f"{name}: {tokens / wall:.0f} tokens/s, {tokens / cpu:.0f} a CPU second", flush=True)


if __name__ == "__main__":
    main()
