"""A YAML file read into `Config`: aliases, line numbers, suggestions, and every mistake at once.

axolotl's training keys may stand flat at the top level; TRL's and LLaMA-Factory's spellings are understood. Imports
pydantic and PyYAML only.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from pipeline.config import words, yaml_lines
from pipeline.config.gate import GateConfig
from pipeline.config.schema import Config, DataConfig, FinetuneConfig, MergeConfig
from pipeline.config.section import Section
from pipeline.config.yaml_lines import KeyPath
from pipeline.errors import ConfigError, Problem

FLAT_SECTIONS: dict[str, type[Section]] = {"data": DataConfig, "finetune": FinetuneConfig, "merge": MergeConfig}

FLAT = {name for section in FLAT_SECTIONS.values() for name in section.model_fields}

# Other tools' spellings of the same settings; the name on the right is axolotl's.
ALIASES = {
    # TRL and transformers
    "model_name_or_path": "base_model",
    "model_revision": "base_model_revision",
    "per_device_train_batch_size": "micro_batch_size",
    "num_train_epochs": "num_epochs",
    "lr_scheduler_type": "lr_scheduler",
    "optim": "optimizer",
    "packing": "sample_packing",
    "max_length": "sequence_len",
    "max_seq_length": "sequence_len",
    "lora_target_linears": "lora_target_linear",
    # LLaMA-Factory
    "cutoff_len": "sequence_len",
    "lora_rank": "lora_r",
    "lora_target": "lora_target_modules",
    "val_size": "val_set_size",
    "stage": "objective",
    # axolotl
    "revision_of_model": "base_model_revision",
    "dropout": "lora_dropout",
    "rl": "objective",
}
DATASET_TYPES = {"chat_template": "messages", "conversational": "messages", "prompt-completion": "prompt_completion"}

# Settings of those tools that tunegate settles itself: a pasted file gets told why.
SETTLED = {
    "output_dir": "artefacts lie under mlruns/work, by the digest of their inputs",
    "bf16": "the precision is chosen for the device",
    "fp16": "the precision is chosen for the device",
    "tf32": "the precision is chosen for the device",
    "flash_attention": "the attention is chosen for the device",
    "trust_remote_code": "code from a model's repository is never run",
    "wandb_project": "metrics go to MLflow",
    "report_to": "metrics go to MLflow",
    "resume_from_checkpoint": "running the same command again resumes",
    "tokenizer_type": "the tokenizer is the base model's own",
    "chat_template": "the chat template is the base model's own",
    "fsdp": "fsdp_version: 2 with num_processes splits the base over the GPUs",
    "fsdp_config": "fsdp_version: 2 splits the base layer by layer and gathers a layer when it is used",
    "deepspeed": "fsdp_version: 2 with num_processes splits the base over the GPUs",
    "distributed_type": "num_processes, and fsdp_version: 2 where the base is to be split, say it",
    "model_type": "the architecture is read from the base model's config.json",
}


def load(
    path: Path,
    overrides: Sequence[str] = (),
    data_dir: Path | None = None,
    judge: Callable[[Config], Iterable[Problem]] = lambda _config: (),
) -> Config:
    """Read a config file.

    `overrides` are `section.key=value` (values are YAML), applied last. Relative dataset and model paths are looked up under
    `data_dir` when given, else beside the file. `judge` tells what is wrong with settings that are right one by one; its
    problems get the file and line of their key.

    Raises ConfigError with every mistake of the file: its line, the key, what is allowed and what was probably meant.
    """
    raw, lines = _read(path)
    problems: list[Problem] = []
    data = _normalise(raw, lines, path, problems)
    for override in overrides:
        _override(data, lines, override, path, problems)
    problems += _truths(data, lines, path)
    data.setdefault("name", re.sub(r"[^A-Za-z0-9._-]", "-", path.stem))
    try:
        config = Config.model_validate(data)
        problems += [_located(problem, lines, path) for problem in judge(config)]
    except ValidationError as error:
        problems += _problems(error, data, lines, path)
    if problems:
        raise ConfigError(_with_one_remedy(problems, _again(path, overrides, data_dir)))
    return _resolve(config, (data_dir or path.parent).resolve())


def load_policy(path: Path) -> GateConfig:
    """Read a gate's policy: the `gate` section of a config file, or a file that holds such a section's keys alone.

    Other sections aren't looked at. Raises ConfigError with every mistake of the policy.
    """
    raw, lines = _read(path)
    whole = "gate" in raw
    policy = raw["gate"] if whole else raw
    key_lines = lines if whole else {("gate", *at): line for at, line in lines.items()}
    rest = {"name": "policy", "data": {"datasets": [{"path": "any"}]}}
    data = {**rest, "gate": policy}
    problems = list(_truths(data, key_lines, path))
    try:
        config = Config.model_validate(data)
    except ValidationError as error:
        problems += _problems(error, data, key_lines, path)
    if problems:
        raise ConfigError(_with_one_remedy(problems, f"tunegate gate --policy {shlex.quote(str(path))}"))
    return config.gate


def _again(path: Path, overrides: Sequence[str], data_dir: Path | None) -> str:
    """The command that checks the file once more, as it was given."""
    further = ["--data-dir", str(data_dir)] if data_dir else []
    return shlex.join(
        ["tunegate", "check", str(path), *further, *(part for text in overrides for part in ("--set", text))]
    )


def _with_one_remedy(problems: Sequence[Problem], again: str) -> list[Problem]:
    """Each place once, in file order; what to do with those that name no remedy of their own stands at the end."""
    places: dict[tuple[Any, ...], Problem] = {}
    for problem in sorted(problems, key=lambda problem: problem.line or 0):
        place = (problem.file, problem.line, problem.key)
        earlier = places.get(place)
        places[place] = _either(earlier, problem) if earlier and not problem.remedy else problem
    unique = list(places.values())
    if any(problem.remedy is None for problem in unique):
        last = unique[-1]
        own = f"{last.remedy}; then" if last.remedy else f"correct {'them' if len(unique) > 1 else 'it'}, then"
        unique[-1] = replace(last, remedy=f"{own}: {again}")
    return unique


def _either(first: Problem, second: Problem) -> Problem:
    """Two findings at one place, where a value may be of several kinds."""
    if first.allowed == second.allowed or not (first.allowed and second.allowed):
        return first
    value = first.what.rpartition(": ")[0]
    what = f"{value}: is not one of the choices" if value else first.what
    return replace(first, what=what, allowed=f"{first.allowed}, or {second.allowed}")


def _truths(data: Mapping[str, Any], lines: Mapping[KeyPath, int], path: Path) -> Iterable[Problem]:
    for at in words.truths(data):
        line = _line(at, lines)
        yield Problem(
            "is a boolean (YAML reads yes, no, on, off as one)", "--set" if line == 0 else str(path), line or None,
            ".".join(map(str, at)), "a number", "write a number",
        )  # fmt: skip


def _read(path: Path) -> tuple[dict[str, Any], dict[KeyPath, int]]:
    """The file's mapping and the 1-based line of every key in it."""
    try:
        value, lines = yaml_lines.read(path)
    except (FileNotFoundError, IsADirectoryError):
        configs = ", ".join(sorted(str(file) for file in Path("configs").glob("*.yaml"))) or "a YAML file"
        raise ConfigError(
            "no such config file", file=str(path), allowed=configs, remedy="tunegate check CONFIG"
        ) from None
    if not isinstance(value, dict):
        raise ConfigError("the file must hold keys", file=str(path), line=1, allowed="a mapping of settings",
                          remedy="start from configs/demo.yaml")  # fmt: skip
    return value, lines


def _normalise(
    raw: Mapping[str, Any], lines: dict[KeyPath, int], path: Path, problems: list[Problem]
) -> dict[str, Any]:
    """Aliases to axolotl's names, flat keys into their section; what is settled elsewhere is a problem."""
    data: dict[str, Any] = {}
    for key, value in raw.items():
        if key in FLAT_SECTIONS and isinstance(value, dict):
            for inner, inner_value in value.items():
                _place(data, (key, inner), inner_value, (key, inner), lines, path, problems)
        else:
            _place(data, (key,), value, (key,), lines, path, problems)
    return data


def _place(
    data: dict[str, Any],
    source: KeyPath,
    value: Any,
    at: KeyPath,
    lines: dict[KeyPath, int],
    path: Path,
    problems: list[Problem],
) -> None:
    spelling = str(source[-1])
    key = ALIASES.get(spelling, spelling)
    line = lines.get(source)
    if spelling in SETTLED:
        problems.append(
            Problem("is not a choice here", str(path), line, spelling, SETTLED[spelling], f"delete line {line}")
        )
        return
    if spelling == "dataset_name":
        key, value = "datasets", [{"path": value}]
    if spelling == "quantization_bit":
        key, value = "load_in_4bit", value == 4
    section = (
        str(at[0])
        if len(at) > 1
        else next((s for s, model in FLAT_SECTIONS.items() if key in model.model_fields), None)
    )
    if key in Config.model_fields:
        section = None
    target: KeyPath = (section, key) if section else (key,)
    where = data.setdefault(section, {}) if section else data
    if not isinstance(where, dict) or key in where:
        problems.append(
            Problem(
                f"{key} is given twice, flat and in a section or under another tool's name",
                str(path),
                line,
                spelling,
                "one value",
                "delete one",
            )
        )
        return
    where[key] = _dataset_types(value) if key in ("datasets", "test_datasets") else value
    for inner in [inner for inner in lines if inner[: len(source)] == source]:
        lines.setdefault((*target, *inner[len(source) :]), lines[inner])


def _dataset_types(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    return [
        {**item, "type": DATASET_TYPES.get(str(item["type"]), item["type"])}
        if isinstance(item, dict) and "type" in item
        else item
        for item in value
    ]


def _override(data: dict[str, Any], lines: dict[KeyPath, int], text: str, path: Path, problems: list[Problem]) -> None:
    """Apply one `section.key=value`."""
    name, equals, value = text.partition("=")
    keys = name.strip().split(".")
    keys = [ALIASES.get(keys[0], keys[0]), *keys[1:]] if len(keys) == 1 else keys
    if len(keys) == 1 and keys[0] not in Config.model_fields:
        keys = [*(s for s, model in FLAT_SECTIONS.items() if keys[0] in model.model_fields), *keys][-2:]
    if not equals or not all(keys):
        problems.append(
            Problem("is not KEY=VALUE", "--set", None, text, "section.key=value", "--set finetune.max_steps=100")
        )
        return
    where: Any = data
    for key in keys[:-1]:
        where = where[int(key)] if isinstance(where, list) and key.isdigit() else where.setdefault(key, {})
        if not isinstance(where, dict | list):
            problems.append(Problem(f"{key} must hold keys", "--set", None, text, None, f"see `tunegate check {path}`"))
            return
    last: Any = keys[-1]
    where[int(last) if isinstance(where, list) else last] = yaml.safe_load(value)
    lines[tuple(int(k) if k.isdigit() else k for k in keys)] = 0


def _problems(
    error: ValidationError, data: Mapping[str, Any], lines: Mapping[KeyPath, int], path: Path
) -> Iterable[Problem]:
    for detail in error.errors(include_url=False):
        if isinstance(detail["input"], bool) and detail["type"].startswith(("greater", "less")):
            continue  # `_truths` says what it is
        at = tuple(part for part in detail["loc"])
        place = _written(at, data)
        line = _line(place, lines)
        key = ".".join(str(part) for part in place) or "the file"
        yield Problem(
            what=words.what(detail),
            file="--set" if line == 0 else str(path),
            line=line or None,
            key=key,
            allowed=words.allowed(detail, place, ALIASES, FLAT),
        )


def _located(problem: Problem, lines: Mapping[KeyPath, int], path: Path) -> Problem:
    """The problem with the place of its key (such as gate.metrics[0].metric) in the file, or of the nearest that stands there."""
    parts = re.findall(r"[^.\[\]]+", problem.key or "")
    line = _line(tuple(int(part) if part.isdigit() else part for part in parts), lines)
    return replace(problem, file="--set" if line == 0 else str(path), line=line or None)


def _line(at: KeyPath, lines: Mapping[KeyPath, int]) -> int | None:
    """The line of the nearest place that stands in the file; for a section of flat keys that of its first key."""
    for n in range(len(at), 0, -1):
        inside = [line for place, line in lines.items() if place[:n] == at[:n]]
        if inside:
            return lines.get(at[:n], min(inside))
    return lines.get((), 1)


def _written(at: KeyPath, data: Any) -> KeyPath:
    """The part of pydantic's location that stands in the file: union tags are dropped, a missing last key is kept."""
    parts: list[str | int] = []
    for n, part in enumerate(at):
        inside = (isinstance(data, dict) and part in data) or (
            isinstance(data, list) and isinstance(part, int) and part < len(data)
        )
        if not inside and not (n == len(at) - 1 and isinstance(data, dict)):
            continue
        parts.append(part)
        data = data[part] if inside else None
    return tuple(parts)


def _resolve(config: Config, root: Path) -> Config:
    """Make paths absolute, so that a stage may run in any folder."""
    data = config.data.model_copy(
        update={
            "datasets": tuple(_absolute(source, root) for source in config.data.datasets),
            "test_datasets": tuple(_absolute(source, root) for source in config.data.test_datasets),
            "benchmarks": tuple(_absolute(source, root) for source in config.data.benchmarks),
        }
    )
    evaluate = config.evaluate
    updates: dict[str, Any] = {
        "tasks": tuple(entry.model_copy(update={"task": _task(entry.task, root)}) for entry in evaluate.tasks)
    }
    if evaluate.prompts:
        updates["prompts"] = str((root / Path(evaluate.prompts).expanduser()).resolve())
    base = absolute_or_id(config.base_model, root, (".gguf",))
    return config.model_copy(update={"data": data, "base_model": base, "evaluate": evaluate.model_copy(update=updates)})


def _absolute(source: Any, root: Path) -> Any:
    suffixes = (".jsonl", ".json", ".csv", ".parquet", ".gz", ".zst", ".txt", ".tsv")
    return source.model_copy(update={"path": absolute_or_id(source.path, root, suffixes)})


def _task(name: str, root: Path) -> str:
    """An lm-eval name as it stands; what has a slash or ends like YAML is a path, made absolute."""
    is_path = "/" in name or name.startswith("~") or name.endswith((".yaml", ".yml"))
    return str((root / Path(name).expanduser()).resolve()) if is_path else name


def absolute_or_id(name: str, root: Path, suffixes: tuple[str, ...]) -> str:
    """A path made absolute under `root`, or a hub id (or pypi:PACKAGE) as it stands.

    A path is a name that exists, starts with `.`, `/` or `~`, ends like a file, or isn't shaped OWNER/NAME.
    """
    path = Path(name).expanduser()
    if name.startswith("pypi:"):
        return name
    is_path = (root / path).exists() or name.startswith((".", "/", "~")) or name.endswith(suffixes)
    return str((root / path).resolve()) if is_path or not re.fullmatch(r"[\w.-]+/[\w.-]+", name) else name


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a config file: the sections, and the flat keys that may stand for them."""
    schema = Config.model_json_schema()
    for section in FLAT_SECTIONS.values():
        flat = section.model_json_schema(ref_template="#/$defs/{model}")
        schema["$defs"].update(flat.pop("$defs", {}))
        for key, value in flat["properties"].items():
            schema["properties"].setdefault(key, value)
    schema["required"] = []  # name has a default of its own, and datasets may stand flat
    return schema
