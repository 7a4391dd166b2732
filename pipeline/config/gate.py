"""The gate's policy as a person writes it: what must hold, and how sure one must be."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.config.section import Fraction, PositiveInt, Section


class MetricCheck(Section):
    """One quality check: a floor, or a paired comparison on the same items."""

    metric: str = Field(
        description="as evaluate reports it: exact_match, accuracy, f1_macro, json_valid, …; an lm-eval task's as TASK/METRIC"
    )
    min: Fraction | None = Field(None, description="the whole interval must reach this")
    against: Literal["base", "incumbent"] | None = None
    margin: Annotated[float, Field(gt=-1, lt=1)] = Field(
        0.0,
        description="how much worse than `against` is allowed, 0.03 being three points; negative: must be better by",
    )
    required: bool = Field(True, description="false: shown in the table, but it doesn't decide")

    @model_validator(mode="after")
    def _something_is_checked(self) -> MetricCheck:
        if self.min is None and self.against is None:
            raise ValueError("a check needs min, against, or both")
        return self


class SliceCheck(Section):
    """A paired comparison within each part of the holdout: no part may be shown to be worse by more than the margin."""

    by: str = Field(
        description="what makes the parts: a column of data.columns, `expected` (each label), or expected.FIELD of JSON answers"
    )
    metric: str
    against: Literal["base", "incumbent"] = "incumbent"
    margin: Annotated[float, Field(ge=0, lt=1)] = 0.0
    min_items: PositiveInt = Field(20, description="smaller parts are judged together, as (other)")


class JudgeCheck(Section):
    """A floor for an LLM judge's win rate; 0.5 is parity."""

    against: Literal["base", "incumbent"] = "incumbent"
    min: Fraction = 0.45


class AllowedRegression(Section):
    """A check that may fail or stay open, with the reason that the reviewer reads beside it at every build until it is dropped."""

    check: str = Field(description="the check's name in the gate's table, such as 'accuracy vs incumbent'")
    reason: Annotated[str, Field(min_length=1)]


class LoadCheck(Section):
    """One load objective at one concurrency; names as in vLLM's bench."""

    metric: Literal[
        "p50_ttft_ms", "p95_ttft_ms", "p99_ttft_ms", "p50_itl_ms", "p95_itl_ms", "p99_itl_ms",
        "p50_e2el_ms", "p95_e2el_ms", "p99_e2el_ms", "output_throughput", "request_throughput",
    ]  # fmt: skip
    max_concurrency: PositiveInt
    max: Annotated[float, Field(gt=0)] | None = None
    min: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _one_bound(self) -> LoadCheck:
        if (self.min is None) == (self.max is None):
            raise ValueError("a load check needs either min or max")
        return self


class GateConfig(Section):
    """The policy: what must hold, and how sure one must be."""

    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    min_items: PositiveInt = Field(100, description="fewer scored items are inconclusive")
    cluster_by: str | None = Field(
        None,
        description="a column of data.columns: items that share its value (a customer, a document) count as one draw",
    )
    metrics: tuple[MetricCheck, ...] = ()
    slices: tuple[SliceCheck, ...] = ()
    prompts: Literal["all", "no_regression"] = Field(
        "all", description="which of evaluate.prompts may not break: any, or those that the incumbent passes"
    )
    judges: tuple[JudgeCheck, ...] = ()
    load: tuple[LoadCheck, ...] = ()
    max_error_rate: Fraction = Field(0.0, description="share of failed requests in evaluation and load test")
    allowed_regressions: tuple[AllowedRegression, ...] = ()
