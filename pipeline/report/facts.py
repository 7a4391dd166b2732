"""A report's names and values: origin of model and data, training, what is served, what to do next."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pipeline.artifacts import Build
from pipeline.finetune.objectives import OBJECTIVES, SFT

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
    """Names and values as text, without those that are absent."""
    return [(name, _text(value)) for name, value in pairs if value not in (None, "", [], {}, ())]


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_text(inner)}" for name, inner in value.items())
    return ", ".join(map(_text, value)) if isinstance(value, list | tuple) else str(value)


def model_facts(build: Build) -> list[tuple[str, str]]:
    """Where the base model comes from and under which licence."""
    base = build.artifacts.get("base")
    detail = base.detail if base else {}
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


def _total(tokens: Any) -> Any:
    return tokens.get("total") if isinstance(tokens, Mapping) else tokens


def data_facts(build: Build) -> list[tuple[str, str]]:
    """Rows and tokens by set, what was dropped, and how near the sets are to each other."""
    prepared = build.artifacts.get("prepare")
    detail = prepared.detail if prepared else {}
    sources = [source.get("path") for source in build.config.get("data", {}).get("datasets", ())]
    near, inside, found = (detail.get(name, {}) for name in ("near_duplicates", "inside", "benchmarks"))
    documents = found.get("documents")
    return facts(
        [
            ("files", [str(path).rpartition("/")[2] for path in sources]),
            ("rows", detail.get("rows")),
            ("tokens", {name: _total(tokens) for name, tokens in detail.get("tokens", {}).items()}),
            ("dropped", detail.get("dropped")),
            ("holdout rows near a training row", near.get("holdout_near_train")),
            ("holdout rows inside a training row", inside.get("holdout_inside_train")),
            ("benchmark documents in training", f"{found['overlapping']:,} of {documents:,}" if documents else None),
        ]
    )


def training_facts(build: Build) -> list[tuple[str, str]]:
    """The settings that were trained with and what came of it, then merging and quantizing."""
    settings, trained = build.config.get("finetune", {}), build.artifacts.get("finetune")
    objective = OBJECTIVES[settings.get("objective", SFT)]
    detail = trained.detail if trained else {}
    quantized = build.artifacts.get("quantize")
    made = quantized.detail if quantized else {}
    batch = settings.get("micro_batch_size", 0) * settings.get("gradient_accumulation_steps", 1)
    merged = build.artifacts["merge"].detail if "merge" in build.artifacts else {}
    return facts(
        [
            *((name, settings.get(name)) for name in TRAINED),
            ("effective batch", batch),
            ("sequence_len", build.config.get("data", {}).get("sequence_len")),
            ("seed", build.config.get("seed")),
            *((name, detail.get(name)) for name in ("steps", "best_step", "tokens", *objective.metrics)),
            ("tokens a second", detail.get("tokens_per_second")),
            ("merged into", _merged_into(merged)),
            ("quantized by", made.get("method")),
            ("calibration samples", made.get("samples")),
            ("perplexity before AWQ", made.get("perplexity_before")),
            ("perplexity after AWQ", made.get("perplexity_after")),
        ]
    )


def _merged_into(detail: Mapping[str, Any]) -> str | None:
    """The base that the adapter went into, and the validation losses that it was chosen by."""
    losses = {name.partition("/")[2]: loss for name, loss in detail.items() if name.startswith("val_loss/")}
    into = f"the {detail['merge_base']} base" if "merge_base" in detail else None
    return f"{into} (validation loss: {_text(losses)})" if losses else into


def serving_facts(build: Build) -> list[tuple[str, str]]:
    """What is served, part by part: its digest is what is judged, approved and promoted."""
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
    """The digest of every artefact of the build, and of the holdout that all were scored on."""
    found = [(f"{stage} artefact", artifact.digest) for stage, artifact in build.artifacts.items()]
    prepared = build.artifacts.get("prepare")
    sets = prepared.detail.get("digests", {}) if prepared else {}
    scored = sorted({evaluation.holdout_digest for evaluation in build.evaluations.values()})
    return facts([("build", build.key), *found, *sets.items(), ("scored on", scored)])


def next_steps(build: Build) -> list[tuple[str, str]]:
    """Commands with what they do, for the verdict that this build has."""
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
