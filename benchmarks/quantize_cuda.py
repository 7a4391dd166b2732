"""AWQ through llm-compressor: pipeline.quantize.llmcompressor against oneshot as its documents show it.

    python benchmarks/quantize_cuda.py BASE [--layers N] [--samples 128] [--tokens 512] [--shortest N] [--sides plain,ours] [--out FOLDER]
        [--compute float32]

Runs in the train environment, on a GPU or, with a small BASE, on a CPU. BASE is a Hugging Face folder
(benchmarks/make_llama.py makes one of 7.4 B). Every side quantizes the same model by the same recipe (AWQModifier with 20
grid points and duo scaling on all tokens, then W4A16 in groups of 128, or of what fits, asymmetric) with the same samples
of random ids, --shortest to --tokens long:

  plain        the model on the CPU, a dataset of one sample a batch
  plain-gpu    the same with the model on the GPU
  ours         pipeline.quantize.llmcompressor, batches as memory allows (or of --batch-tokens)

Without a GPU all sides compute in the dtype that the stage takes on this CPU, or in that of --compute.

Each side has a process to itself. Prints seconds from loading to saved, where they went, the peak of allocated memory, and
for ours what the stage's check takes besides; then how far each side's weights are from the first's: |W - W'| over the
step of the grid and over |W|, and the largest difference between the least errors that the searches found. A near tie
that falls the other way changes a layer's scales and so all its weights, but not its error. Each side's folder gets the base's
tokenizer and template, so that it can be served. Writes each side's JSON. --profile shows the kernels of the first layer's
search, whose seconds then count for nothing.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import llmcompressor
import torch
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from pipeline import compute_dtype
from pipeline.model import weights
from pipeline.quantize import check, formats
from pipeline.quantize import llmcompressor as quantize_llmcompressor
from pipeline.quantize.calibration import PROBE_TOKENS, Sample
from pipeline.quantize.quantize import choose_group_size, linear_shapes

SEED = 1
GRID_POINTS = 20
PARTS = ("load", "forward", "search", "quantize", "save")


@dataclass
class Measured:
    """One side's figures: seconds by part, GiB at the peak, each mapping's least error, seconds of the check."""

    side: str
    seconds: dict[str, float] = field(default_factory=dict)
    peak_gib: float = 0.0
    errors: dict[str, float] = field(default_factory=dict)
    perplexity: tuple[float, float] | None = None

    @property
    def total(self) -> float:
        """From loading to saved."""
        return sum(self.seconds[part] for part in PARTS)

    @contextmanager
    def span(self, part: str) -> Iterator[None]:
        """Count what happens inside."""
        _wait()
        start = time.perf_counter()
        yield
        _wait()
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def watch(found: Measured, profiled: bool) -> None:
    """Time llm-compressor's parts wherever they are called from, and keep what its searches found."""
    smooth, update, finish, oneshot = (
        AWQModifier.on_sequential_epoch_end, QuantizationModifier.on_sequential_epoch_end, AWQModifier.on_finalize,
        llmcompressor.oneshot,
    )  # fmt: skip

    def search(self: Any, *args: Any, **kwargs: Any) -> None:
        with found.span("search"):
            if profiled and self._smooth_activation_stats and not self._error_metrics:
                profile(found.side, lambda: smooth(self, *args, **kwargs))
            else:
                smooth(self, *args, **kwargs)

    def quantize(self: Any, *args: Any, **kwargs: Any) -> None:
        with found.span("quantize"):
            update(self, *args, **kwargs)

    def finalize(self: Any, *args: Any, **kwargs: Any) -> bool:
        found.errors = {one["layer_name"]: one["best_error"] for one in self._error_metrics}
        return bool(finish(self, *args, **kwargs))

    def whole(*args: Any, **kwargs: Any) -> Any:
        with found.span("oneshot"):
            return oneshot(*args, **kwargs)

    AWQModifier.on_sequential_epoch_end, AWQModifier.on_finalize = search, finalize
    QuantizationModifier.on_sequential_epoch_end, llmcompressor.oneshot = quantize, whole


def samples_of(base: Path, args: argparse.Namespace) -> list[list[int]]:
    """Random ids, the same for every side."""
    order, size = random.Random(SEED), AutoConfig.from_pretrained(base).vocab_size
    shortest = args.shortest or args.tokens
    return [
        order.choices(range(min(100, size // 2), size), k=order.randint(shortest, args.tokens))
        for _ in range(args.samples)
    ]


def plain(base: Path, samples: list[list[int]], group_size: int, folder: Path, found: Measured, device: Any) -> None:
    """The recipe as llm-compressor's examples have it."""
    from datasets import Dataset

    with found.span("load"):
        model = compute_dtype.for_quantizing(
            AutoModelForCausalLM.from_pretrained(base, dtype="auto", device_map=device)
        )
        tokenizer = AutoTokenizer.from_pretrained(base)
    rows = Dataset.from_dict({"input_ids": samples, "attention_mask": [[1] * len(sample) for sample in samples]})
    linear = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": group_size, "symmetric": False}
    groups = {"group_0": {"targets": ["Linear"], "weights": linear}}
    recipe = [
        AWQModifier(duo_scaling=True, n_grid=GRID_POINTS),
        QuantizationModifier(config_groups=groups, ignore=["lm_head"]),
    ]
    with quantize_llmcompressor.no_pinning_without_accelerator():
        llmcompressor.oneshot(
            model=model, processor=tokenizer, dataset=rows, recipe=recipe, num_calibration_samples=len(samples),
            max_seq_length=max(map(len, samples)), shuffle_calibration_samples=False,
        )  # fmt: skip
    with found.span("save"):
        compute_dtype.back_to_stored(model)
        model.save_pretrained(folder, save_compressed=True)


def ours(
    base: Path, samples: list[list[int]], group_size: int, folder: Path, found: Measured, batch: int | None
) -> None:
    """The stage's own calls, and its check beside them."""
    with found.span("load"):
        model = quantize_llmcompressor.load(base, folder)
        tokenizer = AutoTokenizer.from_pretrained(base)
    probe = [Sample(tuple(samples[0][:PROBE_TOKENS]))]
    with found.span("check"):
        original = check.read(model, probe)
    with found.span("all"):
        quantize_llmcompressor.quantize(
            model, tokenizer, samples, group_size=group_size, zero_point=True, observer="memoryless_minmax",
            search_tokens=2**31, grid_points=GRID_POINTS, folder=folder, on_layer=lambda *_: None,
            batch_tokens=batch,
        )  # fmt: skip
    found.seconds["save"] = found.seconds.pop("all") - found.seconds["oneshot"]
    del model
    with found.span("check"):
        after = check.compare(quantize_llmcompressor.load(base, folder), folder, probe, original)
    found.perplexity = (original.perplexity, after.perplexity)


def measure(name: str, args: argparse.Namespace) -> Measured:
    """Quantize on one side, into a folder of its own."""
    found, samples = Measured(name), samples_of(args.base, args)
    group_size = choose_group_size("auto", linear_shapes(args.base))
    watch(found, args.profile)
    if args.compute:
        dtype = getattr(torch, args.compute)
        compute_dtype.of_device = lambda _device: dtype
    folder = args.out / name
    folder.mkdir(parents=True, exist_ok=True)
    if name == "ours":
        ours(args.base, samples, group_size, folder, found, args.batch_tokens)
    else:
        plain(args.base, samples, group_size, folder, found, {"": 0} if name == "plain-gpu" else None)
    for path in args.base.iterdir():
        if (
            path.is_file()
            and path.suffix != ".safetensors"
            and path.name != weights.INDEX
            and not (folder / path.name).exists()
        ):
            shutil.copyfile(path, folder / path.name)
    seconds = found.seconds
    seconds["forward"] = seconds.pop("oneshot") - seconds["search"] - seconds["quantize"]
    found.peak_gib = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    return found


def profile(name: str, search: Callable[[], None]) -> None:
    """Where the first layer's search spends its time, by kernel."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    on_gpu = torch.cuda.is_available()
    with profiler(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as seen:
        search()
        _wait()
    events = seen.key_averages()
    kernels = sum(event.count for event in events if event.device_type == torch.autograd.DeviceType.CUDA)
    print(f"{name}: {kernels} kernels in one layer's search")
    by = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    print(events.table(sort_by=by, row_limit=24, max_name_column_width=80))


def apart(one: Path, other: Path) -> dict[str, float]:
    """How far two quantized folders' weights are from each other."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    norms, largest, moved, values = [], 0.0, 0, 0
    with weights.Reader(one) as stored:
        left, right = formats.dequantized(one, device), formats.dequantized(other, device)
        for (name, weight), (_, against) in zip(left, right, strict=True):
            scale = f"{name.removesuffix('.weight')}.weight_scale"
            if scale not in weights.tensors(one):
                continue
            step = stored(scale).to(device).float()
            wrong = (weight - against).abs()
            steps = wrong / step.repeat_interleave(weight.shape[1] // step.shape[1], 1)
            norms.append(float(wrong.norm() / weight.norm()))
            largest = max(largest, float(steps.max()))
            moved += int((steps > 0.5).sum())
            values += weight.numel()
    norms.sort()
    return {
        "largest_steps": largest,
        "share_moved": moved / values,
        "median_of_norm": norms[len(norms) // 2],
        "largest_of_norm": norms[-1],
        "matrices": len(norms),
    }


def cut_to(base: Path, layers: int, out: Path) -> Path:
    """A folder with the first `layers` of the base's decoder layers, its files linked, its weights copied."""
    from safetensors.torch import save_file

    short = out / f"{base.name}-{layers}"
    if (short / "config.json").is_file():
        return short
    short.mkdir(parents=True, exist_ok=True)
    heavy = {path.name for path in weights.files(base)} | {weights.INDEX, "config.json"}
    for path in base.iterdir():
        if path.is_file() and path.name not in heavy:
            (short / path.name).unlink(missing_ok=True)
            (short / path.name).symlink_to(path.resolve())
    kept = [name for name in weights.tensors(base) if ".layers." not in name or int(name.split(".")[2]) < layers]
    with weights.Reader(base) as stored:
        save_file({name: stored(name) for name in kept}, short / weights.SINGLE, metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    (short / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}), encoding="utf-8")
    return short


def told(one: Measured, first: Measured) -> str:
    """A side's line."""
    parts = ", ".join(f"{part} {one.seconds[part]:.1f}" for part in PARTS)
    line = f"{one.side:<10}{one.total:>8.1f} s{first.total / one.total:>7.2f}x{one.peak_gib:>7.1f} GiB   {parts}"
    if one.perplexity:
        before, after = one.perplexity
        line += f"; check besides {one.seconds['check']:.1f}, perplexity {before:.1f} -> {after:.1f}"
    return line


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("--layers", type=int, help="of the base's; all unless given")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--shortest", type=int)
    parser.add_argument("--batch-tokens", type=int, help="of a batch of ours, instead of what memory allows")
    parser.add_argument("--sides", default="plain,ours")
    parser.add_argument("--compute", choices=("bfloat16", "float32"), help="on a CPU, instead of what it multiplies")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("quantize_cuda"))
    parser.add_argument("--only", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure the sides in turn, then hold them against the first."""
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.layers:
        args.base = cut_to(args.base, args.layers, args.out)
    if args.only:
        found = measure(args.only, args)
        (args.out / f"{args.only}.json").write_text(json.dumps(asdict(found), indent=1), encoding="utf-8")
        return
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{card}, torch {torch.__version__}, {args.samples} samples of up to {args.tokens} tokens", flush=True)
    sides: list[Measured] = []
    for name in args.sides.split(","):
        subprocess.run([sys.executable, *sys.argv, "--only", name], check=True)
        sides.append(Measured(**json.loads((args.out / f"{name}.json").read_text(encoding="utf-8"))))
        print(told(sides[-1], sides[0]), flush=True)
    compared = {one.side: against(args.out, one, sides[0]) for one in sides[1:]}
    (args.out / "compared.json").write_text(json.dumps(compared, indent=1), encoding="utf-8")


def against(out: Path, one: Measured, first: Measured) -> dict[str, float]:
    """A side against the first: weights, and what their searches found."""
    errors = [abs(one.errors[name] / error - 1) for name, error in first.errors.items()]
    found = {**apart(out / first.side, out / one.side), "largest_of_error": max(errors), "mappings": len(errors)}
    print(
        f"{one.side} against {first.side}: {found['share_moved']:.2%} of weights in another place of the grid, at most "
        f"{found['largest_steps']:.2f} steps away; |W - W'| / |W| {found['median_of_norm']:.1e} (median of "
        f"{found['matrices']} matrices), {found['largest_of_norm']:.1e} at most; least errors within "
        f"{found['largest_of_error']:.1e} of each other in {found['mappings']} searches",
        flush=True,
    )
    return found


if __name__ == "__main__":
    main()
