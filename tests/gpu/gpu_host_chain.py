"""A use of tunegate from its config to a server that answers, by the commands that a person would type, as steps."""

from __future__ import annotations

import json
import random
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu.gpu_host_memory import Stages
from gpu.gpu_host_sites import Host
from gpu.gpu_host_steps import Row, StepFailed, Steps

GATE_FAILED = 4  # exit code of `tunegate run`
NO_RELEASE_BEFORE = 5  # of `tunegate rollback`
IDLE_MIB = 512  # more than at the start counts as not given back
NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass
class Use:
    """One use of tunegate taken from config to answers: its command line, and what the proxy is asked."""

    part: str
    name: str
    config: str
    data: Path
    overrides: list[str]
    question: Callable[[random.Random], tuple[list[dict[str, str]], str]]
    questions: int

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
        if "nothing waits for review" not in said:
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
        for number in range(self._use.questions):
            messages, expected = self._use.question(chosen)
            try:
                answer = ask(url, self._use.name, messages)
            except (OSError, ValueError, LookupError) as error:
                self._must("questions", None, f"{url} did not answer question {number + 1}: {error!r}")
            right += answer == expected
            if number == 0:
                self._steps.say(f"asked {messages[-1]['content']!r}, answered {answer!r}, expected {expected!r}")
        seconds = time.monotonic() - began
        note = f"all {self._use.questions} answered through {url}, {right} as expected"
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
