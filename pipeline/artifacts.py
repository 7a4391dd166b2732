"""The records that stages hand each other: frozen, and compared by digest.

Every record is JSON; digests come from `digests.py`. `store.py` knows where records lie on disk.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from pipeline.digests import digest_of

Stage = Literal[
    "base",
    "prepare",
    "finetune",
    "merge",
    "quantize",
    "evaluate",
    "prompts",
    "tasks",
    "judge",
    "loadtest",
    "gate",
    "ledger",
    "register",
]
RuntimeName = Literal["process", "docker"]  # where vLLM runs: the keys of serving.runtimes.RUNTIMES
Outcome = Literal["pass", "fail", "inconclusive"]


class Record(BaseModel):
    """A frozen record; an unknown field is an error, so that an old record is noticed."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)


class Artifact(Record):
    """A finished folder in the store.

    `path` holds `payload/` (covered by the digest), `extra/` (plots, reports, curves), `log.txt` and `artifact.json`.
    `parents` maps each input's name to its digest; `made_by` names the deciding package versions; the stage's docstring
    describes `detail`.
    """

    stage: Stage
    key: str
    path: Path
    digest: str
    parents: dict[str, str]
    made_by: dict[str, str]
    detail: dict[str, Any]

    @property
    def payload(self) -> Path:
        """The folder that the digest covers."""
        return self.path / "payload"

    @property
    def extra(self) -> Path:
        """Plots, curves and reports that came along."""
        return self.path / "extra"


class Interval(Record):
    """A point estimate with its confidence interval."""

    value: float
    low: float
    high: float


class Item(Record):
    """One holdout row with its answer: the scores by metric (0 to 1), the answer and the expected one.

    `columns` are the row's further columns that data.columns names; slices and groups are made from them.
    """

    id: str
    prompt: str
    expected: str
    answer: str
    finish_reason: str
    scores: dict[str, float]
    columns: dict[str, str] = {}


class Evaluation(Record):
    """A model as served, scored on the holdout. `metrics` are aggregates with intervals; `items` come in holdout order."""

    system: Literal["base", "merged", "candidate", "incumbent"]
    unit_digest: str
    holdout_digest: str
    metrics: dict[str, Interval]
    items: tuple[Item, ...]
    errors: int = Field(description="requests that failed")
    seconds: float


LedgerStep = Literal["base", "adapter", "merged_original", "merged_dequantized", "quantized", "served"]


class LedgerEntry(Record):
    """One step of a model's making, scored on the first items of the holdout: a line of the loss ledger.

    - base: before training
    - adapter: on the NF4 base, as trained
    - merged_*: both ways to merge; the chosen way comes last
    - quantized: the quantized weights in transformers
    - served: the candidate as vLLM serves it

    `items` come in holdout order, the same for every step.
    """

    step: LedgerStep
    engine: Literal["transformers", "vllm"]
    items: tuple[Item, ...]


class PromptResult(Record):
    """One must-pass prompt with a system's answer; `broken` lists the assertions that failed, and how."""

    id: str
    prompt: str
    answer: str
    broken: tuple[str, ...] = ()


class TaskResult(Record):
    """One metric of an lm-eval task on one system: a value for each of the task's documents, in the task's order."""

    task: str
    metric: str = Field(description="lm-eval's name without its filter, such as acc or exact_match")
    higher_is_better: bool
    ids: tuple[str, ...]
    values: tuple[float, ...]


class Judgement(Record):
    """An LLM judge's view of one item, in both orders: the side with the better answer."""

    id: str
    candidate_first: Literal["candidate", "other", "tie"]
    candidate_second: Literal["candidate", "other", "tie"]
    reason: str = Field("", description="the judge's words in the first order")

    @property
    def score(self) -> float:
        """1 where the candidate won in both orders, 0 where it lost in both, else in between."""
        points = {"candidate": 1.0, "tie": 0.5, "other": 0.0}
        return (points[self.candidate_first] + points[self.candidate_second]) / 2


class JudgeReport(Record):
    """An LLM judge's pairwise comparison of the candidate with another system on holdout items."""

    against: Literal["base", "incumbent"]
    model: str = Field(description="the judge's model, as its endpoint names it")
    win_rate: Interval = Field(description="mean score over items: 0.5 is parity")
    agreement: Interval = Field(description="share of items with the same winner in both orders")
    items: tuple[Judgement, ...]
    failed: int = Field(description="items for which the judge gave no usable answer")


class LoadLevel(Record):
    """One level of a load sweep: vLLM bench's metric names, milliseconds, tokens/s and requests/s; one value a repeat.

    `completed` and `failed` count the requests of all repeats. Intervals are made from `samples`: for each repeat one value a
    finished request (ttft_ms, e2el_ms, output_tokens, gaps). Its itl_ms are the requests' gaps between tokens one after the
    other, `gaps` many from each.
    """

    max_concurrency: int
    completed: int
    failed: int
    metrics: dict[str, tuple[float, ...]]
    samples: dict[str, tuple[tuple[float, ...], ...]] = Field(default={}, repr=False)


class LoadTest(Record):
    """A load sweep over one served model."""

    system: Literal["candidate", "incumbent"]
    unit_digest: str
    levels: tuple[LoadLevel, ...]


class Reports(Record):
    """All that a gate compares, by system (candidate, base, incumbent); an LLM judge's reports are of pairs."""

    evaluations: dict[str, Evaluation]
    loadtests: dict[str, LoadTest] = {}
    tasks: dict[str, tuple[TaskResult, ...]] = {}
    prompts: dict[str, tuple[PromptResult, ...]] = {}
    judged: tuple[JudgeReport, ...] = ()


class Check(Record):
    """One line of the gate's table: `estimate` against `threshold`, in the metric's own unit."""

    name: str
    outcome: Outcome
    estimate: Interval | None
    threshold: float
    rule: str = Field(description="in words: 'accuracy >= 0.8', 'accuracy - base >= -0.02', …")
    why: str
    waived: str = Field("", description="why its outcome doesn't count, such as an allowed regression's reason")


class Verdict(Record):
    """The gate's answer: fail if any check fails, else inconclusive if any is, else pass."""

    outcome: Outcome
    unit_digest: str
    policy_digest: str
    checks: tuple[Check, ...]


class ServedUnit(Record):
    """The thing that is measured, approved and served. Another value in one field gives another digest and voids the approval.

    Host, port, paths, keys and timeouts are left out on purpose.
    """

    weights: str = Field(description="digest of the model folder's weight files")
    tokenizer: str = Field(description="digest of its tokenizer and chat template files")
    configuration: str = Field(description="digest of config.json and generation_config.json")
    runtime: RuntimeName
    runtime_digest: str = Field(description="of the installed packages, or the image's digest")
    vllm_version: str
    flags: tuple[str, ...] = Field(description="vLLM's command line without command.LEFT_OUT, sorted")
    env: dict[str, str]
    device: str = Field(description="class of device, such as cpu-x86_64-avx512_bf16 or NVIDIA H100 80GB HBM3")

    @property
    def digest(self) -> str:
        """SHA-256 of the record."""
        return digest_of(self.model_dump(mode="json"))


class Build(Record):
    """The whole outcome of one run, for the gate, the report and the registry.

    `key` is the digest of everything the build depends on; `config` the resolved config; `artifacts` the finished
    folders by stage, without stages that the config turns off; `ledger` the loss ledger, in order.
    """

    name: str
    key: str
    config: dict[str, Any]
    artifacts: dict[Stage, Artifact]
    unit: ServedUnit
    model_path: Path = Field(description="the folder that was served and would be promoted")
    evaluations: dict[str, Evaluation]
    loadtests: dict[str, LoadTest]
    ledger: tuple[LedgerEntry, ...] = ()
    prompts: dict[str, tuple[PromptResult, ...]] = Field(default={}, description="must-pass prompts by system")
    tasks: dict[str, tuple[TaskResult, ...]] = Field(default={}, description="lm-eval's results by system")
    judged: tuple[JudgeReport, ...] = ()
    verdict: Verdict | None = None

    @property
    def reports(self) -> Reports:
        """The part of it that the gate reads."""
        return Reports(
            evaluations=self.evaluations,
            loadtests=self.loadtests,
            tasks=self.tasks,
            prompts=self.prompts,
            judged=self.judged,
        )


class Approval(Record):
    """A person's decision on one digest."""

    decision: Literal["approved", "rejected"]
    reviewer: str
    reason: str
    unit_digest: str
    at: datetime


class Release(Record):
    """An approved model version, which `promote` may serve. `model_path` is the folder in MLflow's artifact store."""

    name: str
    version: str
    run_id: str
    model_path: Path
    unit: ServedUnit
    approval: Approval
