"""A report's names and values: origin of model and data, training, the served unit, the next commands."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pipeline.artifacts import Build, Stage
from pipeline.finetune.objectives import OBJECTIVES, SFT
from pipeline.report.content import method_label

TRAINED = (
    "adapter",
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "learning_rate",
    "lr_scheduler",
    "num_epochs",
    "max_steps",
)
NOTES = (
    "Intervals cover sampling of the holdout only: other traffic may score otherwise.",
    "Greedy answers can differ between runs, because vLLM's sums depend on what else is in the batch.",
    "Load was put on by a client on the same machine; times hold for the device named here.",
)


def facts(pairs: Iterable[tuple[str, Any]]) -> list[tuple[str, str]]:
    """Names and values as text; absent values are left out."""
    return [(name, _text(fact)) for name, fact in pairs if fact not in (None, "", [], {}, ())]


def _text(fact: Any) -> str:
    if isinstance(fact, bool):
        return "yes" if fact else "no"
    if isinstance(fact, float):
        return f"{fact:.4g}"
    if isinstance(fact, int):
        return f"{fact:,}"
    if isinstance(fact, Mapping):
        return ", ".join(f"{name} {_text(inner)}" for name, inner in fact.items())
    return ", ".join(map(_text, fact)) if isinstance(fact, list | tuple) else str(fact)


def model_facts(build: Build) -> list[tuple[str, str]]:
    """The base model's source and licence."""
    detail = _detail(build, "base")
    return facts(
        [
            ("base model", build.config.get("base_model")),
            ("source", detail.get("source")),
            ("revision", detail.get("revision")),
            ("licence", detail.get("licence") or "not stated: ask its makers before you serve it"),
            ("dequantized from", detail.get("quantized_from")),
            ("architecture", detail.get("architecture")),
            ("parameters", detail.get("parameters")),
        ]
    )


def _detail(build: Build, stage: Stage) -> Mapping[str, Any]:
    """A stage's detail; empty where the build has no such artefact."""
    artifact = build.artifacts.get(stage)
    return artifact.detail if artifact else {}


def _total(tokens: Any) -> Any:
    return tokens.get("total") if isinstance(tokens, Mapping) else tokens


def data_facts(build: Build) -> list[tuple[str, str]]:
    """Rows and tokens by set, dropped rows, and how near the sets are to each other."""
    detail = _detail(build, "prepare")
    sources = [source.get("path") for source in build.config.get("data", {}).get("datasets", ())]
    near, inside, leaks = (detail.get(name, {}) for name in ("near_duplicates", "inside", "benchmarks"))
    documents = leaks.get("documents")
    return facts(
        [
            ("files", [str(path).rpartition("/")[2] for path in sources]),
            ("rows", detail.get("rows")),
            ("tokens", {name: _total(tokens) for name, tokens in detail.get("tokens", {}).items()}),
            ("dropped", detail.get("dropped")),
            ("holdout rows near a training row", near.get("holdout_near_train")),
            ("holdout rows inside a training row", inside.get("holdout_inside_train")),
            ("benchmark documents in training", f"{leaks['overlapping']:,} of {documents:,}" if documents else None),
        ]
    )


def training_facts(build: Build) -> list[tuple[str, str]]:
    """Training's settings and figures, then merging and quantizing."""
    settings = build.config.get("finetune", {})
    objective = OBJECTIVES[settings.get("objective", SFT)]
    detail, quantization = _detail(build, "finetune"), _detail(build, "quantize")
    batch = settings.get("micro_batch_size", 0) * settings.get("gradient_accumulation_steps", 1)
    return facts(
        [
            *((name, settings.get(name)) for name in TRAINED),
            ("effective batch", batch),
            ("sequence_len", build.config.get("data", {}).get("sequence_len")),
            ("seed", build.config.get("seed")),
            *((name, detail.get(name)) for name in ("steps", "best_step", "tokens", *objective.metrics)),
            ("tokens a second", detail.get("tokens_per_second")),
            ("merged into", _merged_into(_detail(build, "merge"))),
            ("quantized by", method_label(build)),
            ("calibration samples", quantization.get("samples")),
            ("perplexity before quantization", quantization.get("perplexity_before")),
            ("perplexity after quantization", quantization.get("perplexity_after")),
        ]
    )


def _merged_into(detail: Mapping[str, Any]) -> str | None:
    """The base that the adapter was merged into, and the validation losses that decided it."""
    losses = {name.partition("/")[2]: loss for name, loss in detail.items() if name.startswith("val_loss/")}
    into = f"the {detail['merge_base']} base" if "merge_base" in detail else None
    return f"{into} (validation loss: {_text(losses)})" if losses else into


def serving_facts(build: Build) -> list[tuple[str, str]]:
    """The served unit, part by part; the unit's digest is evaluated, approved and promoted."""
    unit = build.unit
    return facts(
        [
            ("served unit", unit.digest),
            ("weights", unit.weights),
            ("tokenizer and template", unit.tokenizer),
            ("model configuration", unit.configuration),
            ("runtime", f"{unit.runtime}, {unit.runtime_digest}"),
            ("vLLM", unit.vllm_version),
            ("flags", " ".join(unit.flags)),
            ("environment", unit.env),
            ("device", unit.device),
        ]
    )


def digests(build: Build) -> list[tuple[str, str]]:
    """The digests of the build's artefacts, and of the holdout that every system was scored on."""
    artifacts = [(f"{stage} artefact", artifact.digest) for stage, artifact in build.artifacts.items()]
    sets = _detail(build, "prepare").get("digests", {})
    holdouts = sorted({evaluation.holdout_digest for evaluation in build.evaluations.values()})
    return facts([("build", build.key), *artifacts, *sets.items(), ("scored on", holdouts)])


def next_steps(build: Build) -> list[tuple[str, str]]:
    """Commands and their effects, for this build's verdict."""
    if build.verdict and build.verdict.outcome == "pass":
        return [
            (f"tunegate review {build.name}", "read this page and the items again"),
            (
                f'tunegate approve {build.name} --reviewer YOU --reason "…"',
                "say yes to this digest, on record",
            ),
            (f"tunegate promote {build.name}", "put it behind the proxy, dropping no request"),
            (f"tunegate rollback {build.name}", "put the release before it back"),
        ]
    return [
        (
            "tunegate run CONFIG",
            "build again after changing the data, the training or the policy; nothing was registered",
        )
    ]
