"""QLoRA over several GPUs of one host: how speed and memory change with the number of processes.

    python benchmarks/finetune_scaling.py BASE [--processes 1,2] [--steps 12] [--rows 4] [--length 1024] [--out FOLDER]

Runs in the train environment, the project's folder on PYTHONPATH. BASE is a Hugging Face folder (benchmarks/make_llama.py
makes one of 7.4 B). Every side is pipeline.finetune.train's own step in processes of its own, on rows of random ids, NF4 with double
quantization, LoRA r=16 on all linear layers, dropout 0.05:

  weak    --rows rows a step for each process: the batch grows with the processes
  strong  the same batch, that of the largest weak side, in every number of processes
  split   as weak, with fsdp_version: 2, which splits the frozen base over the processes

Prints tokens/s over all processes (the median step after the first third), efficiency (tokens/s over that of one process on
the same kind of batch, times the processes; 100 % is linear), the largest peak of any card while training and while loading
(of resident memory, loading included, on a CPU), and the loss of the first and last step. Writes scaling.json to FOLDER.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import tempfile
import time
from array import array
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline import hardware, program
from pipeline.config.schema import FinetuneConfig
from pipeline.errors import TunegateError
from pipeline.finetune import launch

SEED, RATE, ROWS_A_BATCH = 1, 2e-4, 4


@dataclass(frozen=True)
class Side:
    """One run: how many processes, rows a step over all of them, and whether the base is split."""

    kind: str
    processes: int
    batch: int

    @property
    def settings(self) -> dict[str, Any]:
        """The config's section for it."""
        optimizer = "paged_adamw_8bit" if hardware.device().kind == "cuda" else "adamw_torch"
        return FinetuneConfig(
            micro_batch_size=self.batch, num_processes=self.processes, fsdp_version=2 if self.kind == "split" else None,
            optimizer=optimizer, learning_rate=RATE, lr_scheduler="constant",
        ).model_dump(mode="json")  # fmt: skip


def rank(request: program.Request, group: Any) -> dict[str, Any]:
    """Train in one of the processes; the figures of all of them."""
    import torch
    from peft.helpers import disable_input_dtype_casting
    from transformers import AutoConfig

    from pipeline.finetune import checkpoints, fsdp, train
    from pipeline.finetune import model as finetune_model
    from pipeline.finetune import rows as finetune_rows
    from pipeline.finetune.packing import Row

    asked = request.config
    settings, base, length = FinetuneConfig(**asked["finetune"]), Path(asked["base"]), asked["length"]
    draw = random.Random(SEED)
    words = range(100, AutoConfig.from_pretrained(base).vocab_size)
    ids = [array("i", draw.choices(words, k=length)) for _ in range(ROWS_A_BATCH * settings.micro_batch_size)]
    rows = [Row(it, it, 0, is_cut=False) for it in ids]
    began = time.perf_counter()
    model, chosen = finetune_model.load(base, settings, length)
    model = finetune_model.with_lora(model, settings, chosen, "0" * 64, seed=SEED)
    if chosen.split:
        fsdp.split(model, chosen.device, group.size)
    training = train.Training(
        model, chosen, settings, finetune_rows.Rows(rows, [], 0, 0),
        sequence_len=length, seed=SEED, folder=request.folder, group=group,
    )  # fmt: skip
    loading, seconds = peak(chosen.device), time.perf_counter() - began
    if chosen.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    state, rates = checkpoints.State(), []
    for _ in range(asked["steps"]):
        numbers = draw.sample(range(len(rows)), settings.micro_batch_size)
        start = time.perf_counter()
        with disable_input_dtype_casting(model):
            training.step(state, numbers)
        if chosen.device == "cuda":
            torch.cuda.synchronize()
        rates.append(length * len(numbers) / (time.perf_counter() - start))
    return {
        "tokens_per_second": statistics.median(rates[len(rates) // 3 :]),
        "peak_gib": group.most(peak(chosen.device), chosen.device) / 2**30,
        "loading_gib": group.most(loading, chosen.device) / 2**30,
        "loading_seconds": seconds,
        "losses": [entry["train_loss"] for entry in state.history],
        "hardware": asdict(chosen),
    }


def peak(device: str) -> int:
    """Bytes: of the card's allocated memory, or on a CPU of this process's resident memory, at their highest."""
    import torch

    return (
        torch.cuda.max_memory_allocated()
        if device == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )


def sides(processes: list[int], rows: int) -> list[Side]:
    """What is run; the largest weak side is also the largest strong one."""
    most = max(processes)
    weak = [Side("weak", count, rows * count) for count in processes]
    strong = [Side("strong", count, rows * most) for count in processes]
    return [*weak, *strong, *(Side("split", count, rows * count) for count in processes if count > 1)]


def measure(side: Side, args: argparse.Namespace) -> dict[str, Any]:
    """Run one side."""
    with tempfile.TemporaryDirectory() as folder:
        config = {"finetune": side.settings, "base": str(args.base), "length": args.length, "steps": args.steps}
        request = program.Request(config, {}, Path(folder))
        return launch.launch(request, side.processes, (str(Path(__file__).resolve()),))


def main() -> None:
    """Measure every side in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("--processes", default="1,2")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--kinds", default="weak,strong,split")
    parser.add_argument("--out", type=Path, default=Path())
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    device = hardware.device()
    print(
        f"{device.name}, {device.count or device.cores} of them, {args.steps} steps of rows of {args.length}",
        flush=True,
    )
    found: list[dict[str, Any]] = []
    one: dict[str, float] = {}
    for side in sides([int(count) for count in args.processes.split(",")], args.rows):
        if side.kind not in args.kinds.split(","):
            continue
        same = next((it for it in found if it["batch"] == side.batch and it["processes"] == side.processes), None)
        try:
            figures = same if same and side.kind == "strong" else measure(side, args)
        except TunegateError as error:
            print(f"{side.kind:<7}{side.processes:>2} processes: {error}", flush=True)
            continue
        found.append({**figures, **asdict(side)})
        rate, losses = figures["tokens_per_second"], figures["losses"]
        if side.processes == 1:
            one[side.kind] = rate
        first = one.get("weak" if side.kind == "split" else side.kind)
        share = f"{rate / side.processes / first:>6.0%}" if first else "     ?"
        print(
            f"{side.kind:<7}{side.processes:>2} processes, {side.batch:>3} rows{rate:>9.0f} tokens/s{share} of linear"
            f"{figures['peak_gib']:>7.2f} GiB a process ({figures['loading_gib']:.2f} while loading,"
            f" {figures['loading_seconds']:.0f} s), {figures['hardware']['frozen_weights']},"
            f" {figures['hardware']['tokens_a_pass']} tokens a pass, loss {losses[0]:.4f} -> {losses[-1]:.4f}",
            flush=True,
        )
        (args.out / "scaling.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if launch.MEETING in os.environ:
        from pipeline.finetune import rank as finetune_rank

        finetune_rank.main(rank)
    else:
        main()
