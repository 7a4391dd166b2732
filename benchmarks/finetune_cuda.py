"""QLoRA on one GPU: pipeline.finetune.train against the plain loop of peft and bitsandbytes.

    python benchmarks/finetune_cuda.py BASE [--rows ROWS.jsonl] [--steps 24] [--sides plain,ours] [--memory 15] [--out FOLDER]

Runs in the train environment. BASE is a Hugging Face folder (benchmarks/make_llama.py makes one of 7.4 B). Every side
trains the same rows in the same order with the same NF4 base (double quantization), LoRA r=16 on all linear layers,
alpha 32, dropout 0.05 and 8-bit paged AdamW, and starts from the same adapter seed:

  plain        rows padded to the longest, prepare_model_for_kbit_training, bf16 autocast, sdpa, every layer checkpointed
               (non-reentrant)
  plain-open   the same without checkpointing
  plain-bf16   as plain without that preparation: bfloat16 between the layers, as TRL, Unsloth and pipeline.finetune.train have it
  ours         pipeline.finetune.train with the same rows in each step, within --memory GiB where that is given
  ours-eager   the same without CUDA graphs
  plain-bf16-open   that without checkpointing
  trl          TRL's SFTTrainer as its documents show QLoRA, with Liger's kernels (finetune_peers.py)
  unsloth      Unsloth as its documents show it: no dropout, its own checkpoints
  ours-full    the same as ours with --fill times as many rows a step and all of the card's memory: no comparison of curves

Without ROWS.jsonl (prepared rows) a step has 4 rows of 1024 random ids, of which 16 are learned by heart; with it, 32
rows. Each side has a process to itself. Prints useful tokens/s (padding isn't counted; the median step after the first
third), the peak of allocated memory, and model FLOP utilisation: tokens/s times (4 N + 6 L h s) over --peak-tflops, for N
parameters in matrices (a frozen base needs no weight gradients: 2 N forward, 2 N backward), L layers of width h and rows of
s tokens (causal attention: 2 L h s forward, twice that backward); what is computed twice isn't counted twice. The last column
is the mean difference of a step's loss from the first side's. Writes each side's JSON and losses.png to FOLDER.
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
from array import array
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import finetune_peers

if sys.argv[-2:] == ["--only", "unsloth"]:
    finetune_peers.ready_unsloth()  # it patches what comes now

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from peft.helpers import disable_input_dtype_casting
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.config.schema import FinetuneConfig
from pipeline.finetune import checkpoints
from pipeline.finetune import model as finetune_model
from pipeline.finetune import rows as finetune_rows
from pipeline.finetune import train as finetune
from pipeline.finetune.packing import IGNORED, Row, encode

SEED = 1
RATE = 2e-4
RANDOM_ROWS, RANDOM_LENGTH, RANDOM_BATCH, REAL_BATCH = 16, 1024, 4, 32
Step = Callable[[Sequence[int]], float]
PEERS = {"trl": finetune_peers.trl, "unsloth": finetune_peers.unsloth}


@dataclass(frozen=True)
class Measured:
    """One side's figures: useful tokens a second, GiB at the peak, model FLOP utilisation, loss of every step."""

    side: str
    tokens_per_second: float
    peak_gib: float
    utilisation: float
    seconds_to_first_step: float
    losses: tuple[float, ...]


@dataclass(frozen=True)
class Work:
    """The rows, and which of them each step takes."""

    base: Path
    rows: list[Row]
    batches: list[list[int]]
    sequence_len: int

    def tokens(self, batch: Sequence[int]) -> int:
        """Useful tokens of a step."""
        return sum(len(self.rows[number].input_ids) for number in batch)


def work(base: Path, file: Path | None, steps: int, fill: int = 1) -> Work:
    """Random rows, or the prepared ones of a file, in a fixed order; `fill` times the usual number a step."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    order = random.Random(SEED)
    if file is None:
        ids = [array("i", order.choices(range(100, len(tokenizer)), k=RANDOM_LENGTH)) for _ in range(RANDOM_ROWS)]
        rows, batch, sequence_len = [Row(it, it, 0, is_cut=False) for it in ids], RANDOM_BATCH, RANDOM_LENGTH
    else:
        with file.open(encoding="utf-8") as lines:
            chosen = (json.loads(line) for line in islice(lines, steps * REAL_BATCH))
            ends = finetune_rows.end_tokens(base, tokenizer)
            rows = list(encode(chosen, tokenizer, end_tokens=ends, sequence_len=256))
        batch, sequence_len = REAL_BATCH, 256
    numbers = list(range(len(rows)))
    drawn: list[int] = []
    while len(drawn) < steps * batch * fill:
        order.shuffle(numbers)
        drawn += numbers
    batches = [drawn[at : at + batch * fill] for at in range(0, steps * batch * fill, batch * fill)]
    return Work(base, rows, batches, sequence_len)


def plain(it: Work, *, checkpointed: bool = True, prepared: bool = True) -> tuple[Step, Any]:
    """The loop that peft's and bitsandbytes' documents show."""
    import bitsandbytes

    settings = FinetuneConfig()
    four = finetune_model.four_bit(settings, torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(
        it.base, dtype=torch.bfloat16, quantization_config=four, attn_implementation="sdpa", device_map={"": 0}
    )
    checkpointing = {"use_reentrant": False}
    if prepared:
        model = prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=checkpointed, gradient_checkpointing_kwargs=checkpointing
        )
    elif checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
        model.enable_input_require_grads()
    torch.manual_seed(SEED)
    config = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted: Any = get_peft_model(model, config).train()
    weights = [weight for weight in adapted.parameters() if weight.requires_grad]
    optimizer = bitsandbytes.optim.PagedAdamW8bit(weights, lr=RATE, weight_decay=0.0)

    def step(batch: Sequence[int]) -> float:
        some = [it.rows[number] for number in batch]
        longest = max(len(row.input_ids) for row in some)
        ids = torch.tensor([[*row.input_ids, *[0] * (longest - len(row.input_ids))] for row in some], device="cuda")
        labels = torch.tensor([[*row.labels, *[IGNORED] * (longest - len(row.labels))] for row in some], device="cuda")
        seen = torch.tensor([[1] * len(row.input_ids) + [0] * (longest - len(row.input_ids)) for row in some])
        with torch.autocast("cuda", torch.bfloat16):
            loss = adapted(input_ids=ids, attention_mask=seen.to("cuda"), labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step, adapted


def ours(it: Work, optimizer: str, *, eager: bool = False) -> tuple[Step, Any]:
    """pipeline.finetune.train's own step, over the same rows."""
    batch = len(it.batches[0])
    settings = FinetuneConfig(
        micro_batch_size=batch, optimizer=optimizer, learning_rate=RATE, lr_scheduler="constant", logging_steps=1,
    )  # fmt: skip
    model, execution = finetune_model.load(it.base, settings, it.sequence_len)
    if eager:
        execution = replace(execution, cuda_graphs=False)
    model = finetune_model.with_lora(model, settings, execution, "0" * 64, seed=SEED)
    training = finetune.Training(
        model, execution, settings, finetune_rows.Rows(it.rows, [], 0, 0),
        sequence_len=it.sequence_len, seed=SEED, folder=Path(tempfile.mkdtemp()),
    )  # fmt: skip
    print("ours:", asdict(execution), flush=True)
    state = checkpoints.State()

    def step(batch: Sequence[int]) -> float:
        with disable_input_dtype_casting(model):
            training.step(state, batch)
        return float(state.history[-1]["train_loss"])

    return step, model


def flop_a_token(it: Work) -> float:
    """4 N + 6 L h s, as this file's first lines explain it; the embedding isn't multiplied with."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(it.base)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    embedding = 0 if config.tie_word_embeddings else model.get_input_embeddings().weight.numel()
    matrices = sum(weight.numel() for weight in model.parameters()) - embedding
    length = statistics.mean(len(row.input_ids) for row in it.rows)
    return 4 * matrices + 6 * config.num_hidden_layers * config.hidden_size * length


def measure(name: str, it: Work, args: argparse.Namespace) -> Measured:
    """Train every batch of `it` on one side."""
    began = time.perf_counter()
    if name in ("ours", "ours-eager") and args.memory:
        torch.cuda.set_per_process_memory_fraction(args.memory * 2**30 / torch.cuda.mem_get_info()[1])
    if name in PEERS:
        train, _model = PEERS[name](it)
        seconds, losses = timed_by_itself(train)
    else:
        step, _model = {
            "plain": lambda: plain(it),
            "plain-bf16": lambda: plain(it, prepared=False),
            "plain-bf16-open": lambda: plain(it, checkpointed=False, prepared=False),
            "plain-open": lambda: plain(it, checkpointed=False),
            "ours": lambda: ours(it, args.optimizer),
            "ours-eager": lambda: ours(it, args.optimizer, eager=True),
            "ours-full": lambda: ours(it, args.optimizer),
        }[name]()
        print(f"{name}: loaded after {time.perf_counter() - began:.0f} s", flush=True)
        seconds, losses = timed(step, it.batches)
        if args.profile:
            profile(name, step, it.batches[-1])
    rates = [it.tokens(batch) / took for batch, took in zip(it.batches, seconds, strict=True)]
    rate = statistics.median(rates[len(rates) // 3 :])
    peak = torch.cuda.max_memory_allocated() / 2**30
    utilisation = rate * flop_a_token(it) / (args.peak_tflops * 1e12)
    return Measured(name, rate, peak, utilisation, seconds[0], tuple(losses))


def timed(step: Step, batches: Sequence[Sequence[int]]) -> tuple[list[float], list[float]]:
    """Seconds and loss of every step."""
    torch.cuda.reset_peak_memory_stats()
    seconds, losses = [], []
    for batch in batches:
        torch.cuda.synchronize()
        start = time.perf_counter()
        losses.append(step(batch))
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds, losses


def timed_by_itself(train: finetune_peers.Train) -> tuple[Sequence[float], Sequence[float]]:
    """The same from a trainer that runs its own loop."""
    torch.cuda.reset_peak_memory_stats()
    trained = train()
    return trained.seconds, trained.losses


def profile(name: str, step: Step, batch: Sequence[int]) -> None:
    """Where one step's time goes, by kernel and by operation."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    with profiler(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        step(batch)
        torch.cuda.synchronize()
    events = seen.key_averages()
    kernels = sum(event.count for event in events if event.device_type == torch.autograd.DeviceType.CUDA)
    print(f"{name}: {kernels} kernels in a step")
    print(events.table(sort_by="self_cuda_time_total", row_limit=28, max_name_column_width=80))


def line(one: Measured, first: Measured) -> str:
    """A side's row of the table."""
    apart = statistics.mean(abs(mine - its) for mine, its in zip(one.losses, first.losses, strict=True))
    curve = "" if one.side == "ours-full" else f"{apart:>8.4f} nats apart"
    return (
        f"{one.side:<12}{one.tokens_per_second:>9.0f} tokens/s{one.tokens_per_second / first.tokens_per_second:>8.2f}x"
        f"{one.peak_gib:>8.1f} GiB{one.utilisation:>8.1%} MFU, first step {one.seconds_to_first_step:.1f} s,"
        f" loss {one.losses[0]:.4f} -> {one.losses[-1]:.4f}{curve}"
    )


def draw(found: Sequence[Measured], file: Path) -> None:
    """The loss of every side, step by step."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    for one in found:
        axes.plot(range(1, len(one.losses) + 1), one.losses, label=f"{one.side}: {one.tokens_per_second:.0f} tokens/s")
    axes.set(xlabel="step", ylabel="training loss (nats)")
    axes.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--sides", default="plain,plain-open,ours")
    parser.add_argument("--fill", type=int, default=8)
    parser.add_argument("--optimizer", default="paged_adamw_8bit")
    parser.add_argument("--unsloth", type=Path, help="folder to import Unsloth and what it needs from")
    parser.add_argument("--memory", type=float)
    parser.add_argument("--peak-tflops", type=float, default=790.0)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--out", type=Path, default=Path())
    parser.add_argument("--only", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure the sides in turn and print their ratios to the first."""
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.only:
        fill = args.fill if args.only == "ours-full" else 1
        found = measure(args.only, work(args.base, args.rows, args.steps, fill), args)
        (args.out / f"{args.only}.json").write_text(json.dumps(asdict(found)), encoding="utf-8")
        return
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {args.steps} steps", flush=True)
    sides: list[Measured] = []
    for name in args.sides.split(","):
        path = [str(args.unsloth)] if name == "unsloth" and args.unsloth else []
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join([*path, os.environ.get("PYTHONPATH", "")])}
        if subprocess.run([sys.executable, *sys.argv, "--only", name], env=environ, check=False).returncode:
            print(f"{name}: failed, see above", flush=True)
            continue
        sides.append(Measured(**json.loads((args.out / f"{name}.json").read_text(encoding="utf-8"))))
    for one in sides:
        print(line(one, sides[0]), flush=True)
    draw([one for one in sides if one.side != "ours-full"], args.out / "losses.png")


if __name__ == "__main__":
    main()
