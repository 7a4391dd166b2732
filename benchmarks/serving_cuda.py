"""Serving one model: plain transformers, vLLM in bf16, and vLLM on its AWQ weights, at growing concurrency.

    python benchmarks/serving_cuda.py --bf16 FOLDER --awq FOLDER [--concurrency 1,8,32,64,128,256] [--input-len 256]
        [--output-len 128] [--sides transformers,bf16,awq] [--starts 3] [--time-limit 300] [--serve YAML]
        [--python INTERPRETER] [--out FOLDER]
    python benchmarks/serving_cuda.py --table FOLDER ... [--out FOLDER]

Needs the control environment's packages here, and the serve environment (or INTERPRETER, with this shell's PYTHONPATH)
for vLLM and transformers. vLLM is started as tunegate starts it, through pipeline.serving.serve, with a KV cache of what the GPU
has free beside the weights, three times: cold, with nothing compiled before; warm; and `moved`, from another folder of the
same bytes, as a promotion does after an evaluation. The seconds run until a real completion came back and hold the digests
of the folder, except in `warm`, where this process knows them. Each side has --time-limit seconds for its levels. --serve
takes further keys of a config's section `serve`: '{tensor_parallel_size: 2, env: {NCCL_NVLS_ENABLE: "0"}}'.

Prints a table with ratios to transformers, AWQ against bf16 at each level, and from where on AWQ stops paying. Writes
serving.json and serving.png to --out; sides that lie there, measured before on the same device with the same levels, are
kept, so that each side may have a command of its own. --table measures nothing: it makes one table and picture of what
commands with an --out of their own each measured under the same conditions, say on two cards of one host.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from pipeline import hardware
from pipeline.config.schema import ServeConfig
from pipeline.environments import interpreters
from pipeline.environments.interpreters import Environment
from pipeline.errors import TunegateError
from pipeline.serving import digests as serving_digests
from pipeline.serving import serve as serving
from pipeline.serving.diagnosis import last_run
from pipeline.serving.server import ToServe

NAME = "benchmark"
SIDES = ("transformers", "bf16", "awq")
SEED = 1
SPARE = 64  # tokens: a tokenizer's own, and what decoding random ids adds
FREE_SHARE, BESIDE_WEIGHTS, KV_ON_CPU = 0.92, 6 * 2**30, 2**30  # activations and CUDA graphs lie beside the weights
TELLING = re.compile(
    r"Using \S*Kernel|[Aa]ttention backend|FlashAttention|Loading weights took|Model loading took|Directly load AOT"
    r"|load failure|saved AOT|torch\.compile took|Compiling a graph|Graph capturing|KV cache size|init engine|autotun"
)
KERNEL = re.compile(r"Using (\w*Kernel\w*) for")
Side = dict[str, Any]


def main() -> int:
    """Run the sides in turn; 1 when one of them failed."""
    options = arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    failed = False
    sides = joined(options) if options.table else earlier(options)
    for name in options.sides:
        print(f"\n=== {name}", flush=True)
        try:
            sides[name] = plain(options) if name == "transformers" else vllm(name, options)
        except (TunegateError, subprocess.CalledProcessError) as error:
            failed = True
            print(f"{name} failed: {error}", flush=True)
        write(options, sides)
    sides = {name: sides[name] for name in SIDES if name in sides}
    show(sides, options)
    draw(sides, options.out / "serving.png")
    return int(failed)


def arguments() -> argparse.Namespace:
    """What was asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--bf16", type=Path, help="a Hugging Face folder in bf16")
    parser.add_argument("--awq", type=Path, help="the same model in compressed-tensors W4A16")
    parser.add_argument("--concurrency", type=numbers, default=(1, 8, 32, 64, 128, 256))
    parser.add_argument("--input-len", type=int, default=256)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--sides", type=lambda text: text.split(","), default=list(SIDES))
    parser.add_argument("--starts", type=int, choices=(1, 2, 3), default=3, help="how many of the three starts")
    parser.add_argument("--time-limit", type=float, default=300, help="seconds for the levels of a side")
    parser.add_argument("--serve", type=serve_section, default={}, help="more of a config's section serve, as YAML")
    parser.add_argument("--python", type=Path, help="an interpreter with vLLM; default: the serve environment")
    parser.add_argument("--table", type=Path, nargs="+", default=[], help="folders with a serving.json each")
    parser.add_argument("--out", type=Path, default=Path("serving-benchmark"))
    options = parser.parse_args()
    options.out = options.out.resolve()
    if options.table:
        options.sides = []
        return options
    unknown = set(options.sides) - set(SIDES)
    if unknown or not all(folder_of(side, options) for side in options.sides):
        parser.error(f"--sides takes {', '.join(SIDES)}, each with its folder")
    places = [Path(entry) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    options.environment = (
        Environment("serve", options.python.absolute(), tuple(places)) if options.python else interpreters.find("serve")
    )
    return options


def serve_section(text: str) -> Side:
    """Keys of a config's section serve, as YAML."""
    try:
        found: Side = yaml.safe_load(text)
        ServeConfig.model_validate(found)
    except (yaml.YAMLError, ValidationError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return found


def numbers(text: str) -> tuple[int, ...]:
    """A list of concurrencies, smallest first."""
    return tuple(sorted({int(part) for part in text.split(",")}))


def folder_of(side: str, options: argparse.Namespace) -> Path | None:
    """The model folder that a side serves."""
    folder: Path | None = options.awq if side == "awq" else options.bf16
    return folder.resolve() if folder else None


def plain(options: argparse.Namespace) -> Side:
    """Transformers' generate, in a process of its own."""
    return {"starts": {}, "levels": levels("transformers", options, model_path=str(folder_of("transformers", options)))}


def vllm(side: str, options: argparse.Namespace) -> Side:
    """A server started three times; the levels are put on the first one."""
    folder = folder_of(side, options)
    assert folder is not None
    widest = max(options.concurrency)
    length = options.input_len + options.output_len + SPARE
    kv = kv_bytes(folder, options.serve.get("tensor_parallel_size", 1))
    ours = {
        "max_model_len": length, "max_num_seqs": widest, "kv_cache_memory": f"{kv >> 20}MiB", "startup_timeout": 900,
    }  # fmt: skip
    serve = ServeConfig.model_validate({**ours, **options.serve})
    print(f"KV cache {kv / 2**30:.1f} GiB, max_num_seqs {widest}, max_model_len {length}")
    made: Side = {"starts": {}, "levels": [], "kernel": None, "kv_gib": kv / 2**30}
    with tempfile.TemporaryDirectory(prefix=".work-", dir=options.out) as work:
        os.environ["TUNEGATE_HOME"] = str(Path(work, "home"))
        moved = shutil.copytree(folder, Path(work, "moved"), copy_function=link_or_copy)
        for start, model in (("cold", folder), ("warm", folder), ("moved", moved))[: options.starts]:
            began = time.monotonic()
            serving_digests.model_digests(model)
            digests = time.monotonic() - began
            unit = serving.served_unit(model, serve, NAME, options.environment)
            to_serve = ToServe(unit, model, serve, NAME, Path(work, start), options.environment)
            with serving.running(to_serve, lambda _: None) as server:
                took = round(time.monotonic() - began, 1)
                made["starts"][start] = took
                print(
                    f"{start} start: {took} s until an answer, of which digests of the folder {digests:.1f} s",
                    flush=True,
                )
                made["kernel"] = made["kernel"] or tell_log(server.log)
                if start == "cold":
                    made["gpu_gib_idle"] = in_use_gib()
                    made["levels"] = levels(side, options, url=server.url, model=NAME, model_path=str(folder))
        for log in Path(work).glob("*/vllm.log"):
            shutil.copyfile(log, options.out / f"{side}-{log.parent.name}.log")
    return made


def link_or_copy(source: str, target: str) -> str:
    """A hard link where both lie on one file system."""
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copyfile(source, target)
    return target


def kv_bytes(folder: Path, parts: int) -> int:
    """What each GPU has left beside its part of the weights, or a little on a CPU."""
    cards = hardware.gpu_memory() if hardware.device().kind == "cuda" else ()
    if not cards:
        return KV_ON_CPU
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors")) // parts
    room = int(cards[0].free * FREE_SHARE) - weights - BESIDE_WEIGHTS
    if room < KV_ON_CPU:
        raise SystemExit(f"no room for a KV cache beside {weights / 2**30:.1f} GiB of weights: {cards[0].told()}")
    return room


def in_use_gib() -> float | None:
    """GiB of the first GPU in use now."""
    cards = hardware.gpu_memory()
    return round((cards[0].total - cards[0].free) / 2**30, 2) if cards else None


def tell_log(log: Path) -> str | None:
    """Print what vLLM says of its kernels and of the parts of its start; the kernel's name."""
    lines = [line for line in last_run(log) if TELLING.search(line) and "with config:" not in line]
    for line in dict.fromkeys(lines):
        print(f"  {line[:220]}")
    found = KERNEL.search("\n".join(lines))
    return found[1] if found else None


def levels(side: str, options: argparse.Namespace, **target: str) -> list[Side]:
    """The levels of a side, by serving_levels.py in the serve environment, printed as they come."""
    request = {"url": "", "model": "", "concurrency": options.concurrency, "input_len": options.input_len, "seed": SEED,
               "output_len": options.output_len, "time_limit": options.time_limit, **target}  # fmt: skip
    file = options.out / f"{side}-request.json"
    file.write_text(json.dumps(request), encoding="utf-8")
    environ = {**interpreters.child_environ(options.environment), "HF_HUB_OFFLINE": "1", "NO_PROXY": "*"}
    script = Path(__file__).with_name("serving_levels.py")
    command = [str(options.environment.interpreter), "-P", str(script), str(file)]
    found: list[Side] = []
    with (options.out / f"{side}-levels.log").open("w", encoding="utf-8") as log:
        child = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=log, text=True)
        assert child.stdout is not None
        for line in child.stdout:
            if not line.startswith('{"concurrency"'):  # bench prints tables, too
                log.write(line)
                continue
            found.append(json.loads(line))
            print(f"  {said(found[-1])}", flush=True)
    if child.wait():
        print(f"  the client ended with status {child.returncode}: see {log.name}")
    return found


def said(level: Side) -> str:
    """One level in a line."""
    head = f"concurrency {level['concurrency']:>4}"
    if "skipped" in level:
        return f"{head}  skipped: {level['skipped']}"
    gpu = f"{level['gpu_gib']} GiB, GPU {level['gpu_utilisation']} %" if "gpu_gib" in level else "no GPU seen"
    lost = f", {level['failed']} FAILED" if level["failed"] else ""
    times = "  ".join(
        f"{name.upper()} " + "/".join(f"{level[f'p{p}_{name}_ms']:.1f}" for p in (50, 95, 99))
        for name in ("ttft", "itl")
    )
    return (
        f"{head}  {level['output_throughput']:>8.1f} tok/s  {level['request_throughput']:>6.2f} req/s  {times} ms"
        f"  {gpu}  ({level['requests']} requests{lost}, {level['seconds']:.0f} s)"
    )


def measured(side: Side) -> dict[int, Side]:
    """The levels that were measured, by concurrency."""
    return {level["concurrency"]: level for level in side["levels"] if "skipped" not in level}


def show(sides: dict[str, Side], options: argparse.Namespace) -> None:
    """The table, and where AWQ stops paying."""
    print(f"\noutput tokens/s, {options.input_len} in, {options.output_len} out (ratio to transformers; itl p95 in ms)")
    print(f"{'concurrency':<13}" + "".join(f"{name:>30}" for name in sides) + f"{'awq / bf16':>14}")
    found = {name: measured(side) for name, side in sides.items()}
    for size in options.concurrency:
        cells = [cell(by_size.get(size), found.get("transformers", {}).get(size)) for by_size in found.values()]
        paid = ratio(found, size)
        print(f"{size:<13}" + "".join(f"{text:>30}" for text in cells) + f"{f'{paid:.2f}' if paid else '-':>14}")
    for name, side in sides.items():
        if side["starts"]:
            starts = ", ".join(f"{start} {seconds} s" for start, seconds in side["starts"].items())
            print(f"{name}: start {starts}; kernel {side['kernel'] or 'not named in the log'}")
    print(verdict([(size, paid) for size in options.concurrency if (paid := ratio(found, size))]))


def cell(level: Side | None, plain_level: Side | None) -> str:
    """Throughput with its ratio and the p95 between tokens."""
    if level is None:
        return "-"
    times = f"{level['output_throughput'] / plain_level['output_throughput']:.1f}x" if plain_level else "-"
    return f"{level['output_throughput']:.0f} ({times}; {level['p95_itl_ms']:.1f})"


def ratio(found: dict[str, dict[int, Side]], size: int) -> float | None:
    """AWQ's throughput over bf16's at a level, where both were measured."""
    pair = [found.get(name, {}).get(size) for name in ("awq", "bf16")]
    return pair[0]["output_throughput"] / pair[1]["output_throughput"] if pair[0] and pair[1] else None


def verdict(ratios: Sequence[tuple[int, float]]) -> str:
    """From which concurrency on AWQ is slower than bf16, at that level and all above it."""
    if not ratios:
        return "AWQ against bf16: no level was measured on both"
    last_that_pays = max((size for size, paid in ratios if paid >= 1), default=0)
    slower = [size for size, _ in ratios if size > last_that_pays]
    if not slower:
        return "AWQ stops paying: never within the levels"
    return f"AWQ stops paying from concurrency {slower[0]} on (its throughput is under bf16's)"


def conditions(options: argparse.Namespace) -> Side:
    """What figures must have in common to stand in one table."""
    return {
        "device": hardware.device().name, "concurrency": list(options.concurrency),
        "input_len": options.input_len, "output_len": options.output_len,
        "serve": options.serve, "model": shape(options),
    }  # fmt: skip


def shape(options: argparse.Namespace) -> Side:
    """What models of one shape have in common, quantized or not."""
    folder = options.bf16 or options.awq
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return {key: config.get(key) for key in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")}


def earlier(options: argparse.Namespace) -> dict[str, Side]:
    """The sides measured before under the same conditions, without those that are asked for now."""
    file = options.out / "serving.json"
    report = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if report.get("conditions") != conditions(options):
        return {}
    return {name: side for name, side in report["sides"].items() if name not in options.sides}


def joined(options: argparse.Namespace) -> dict[str, Side]:
    """All sides of --table's folders; their conditions, which have to be the same, become the options'."""
    sides: dict[str, Side] = {}
    first: Side = {}
    for folder in options.table:
        file = folder / "serving.json"
        if not file.is_file():
            raise SystemExit(f"{file}: isn't there; --table takes folders that were another command's --out")
        report = json.loads(file.read_text(encoding="utf-8"))
        first = first or report["conditions"]
        if report["conditions"] != first:
            raise SystemExit(f"{file}: measured under {report['conditions']}, the first under {first}")
        if twice := sides.keys() & report["sides"].keys():
            raise SystemExit(
                f"{file}: {', '.join(sorted(twice))} was measured in a folder before it, too; leave one out"
            )
        sides |= report["sides"]
    options.concurrency, options.input_len, options.output_len = (
        first[key] for key in ("concurrency", "input_len", "output_len")
    )
    print(f"{first['device']}; serve: {first['serve'] or 'as tunegate has it'}")
    return sides


def write(options: argparse.Namespace, sides: dict[str, Side]) -> None:
    """All figures so far, with the device that gave them."""
    report = {"conditions": conditions(options), "sides": sides}
    (options.out / "serving.json").write_text(json.dumps(report, indent=1), encoding="utf-8")


def draw(sides: dict[str, Side], file: Path) -> None:
    """Throughput and p95 between tokens over concurrency, all sides in one picture."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    ticks = sorted({size for side in sides.values() for size in measured(side)})
    if not ticks:
        print("no plot: no level was measured")
        return
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for axis, metric, label in zip(
        axes, ("output_throughput", "p95_itl_ms"), ("output tokens / s", "ms between tokens, p95"), strict=True
    ):
        for name, side in sides.items():
            points = measured(side)
            axis.plot(list(points), [level[metric] for level in points.values()], marker="o", label=name)
        axis.set(xlabel="concurrency", ylabel=label, xscale="log", yscale="log")
        axis.set_xticks(ticks, labels=[str(size) for size in ticks], minor=False)
        axis.set_xticks([], minor=True)
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.grid(visible=True, alpha=0.3)
        axis.legend()
    figure.savefig(file, dpi=120)
    print(f"plot: {file}")


if __name__ == "__main__":
    sys.exit(main())
