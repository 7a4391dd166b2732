"""Reading a config: every defect has its line, what is allowed and a next command."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config.file import json_schema, load, load_policy
from pipeline.config.schema import Config
from pipeline.errors import ConfigError, Problem

CONFIGS = sorted((Path(__file__).parents[3] / "configs").rglob("*.yaml"))
GOOD = "datasets:\n  - path: train.jsonl\n"

# name, text after GOOD (line 3 on), line, words of the problem, words of what is allowed or of the remedy
BROKEN = [
    ("unknown key", "learning_rte: 1e-4\n", 3, "learning_rte: unknown key", "did you mean learning_rate?"),
    ("unknown key in a section", "serve:\n  dtpe: float16\n", 4, "serve.dtpe: unknown key", "did you mean dtype?"),
    ("wrong type", "finetune:\n  lora_r: many\n", 4, "finetune.lora_r: 'many'", "tunegate check"),
    ("out of range", "lora_dropout: 1.5\n", 3, "finetune.lora_dropout: 1.5", "< 1"),
    (
        "a share of more than all",
        "val_set_size: 1.5\n",
        3,
        "1.5: must be a share below 1, or a whole number of rows",
        "tunegate",
    ),
    (
        "a negative bound",
        "gate: {load: [{metric: p50_ttft_ms, max_concurrency: 1, max: -5}]}\n",
        3,
        "gate.load.0.max: -5",
        "> 0",
    ),
    ("no such choice", "optimizer: sgd\n", 3, "finetune.optimizer: 'sgd'", "adamw_torch"),
    ("given twice", "seed: 1\nseed: 2\n", 4, "given twice, first on line 3", "delete one"),
    ("given under two names", "lora_r: 8\nlora_rank: 16\n", 4, "lora_r is given twice", "delete one"),
    (
        "one where a list is wanted",
        "loadtest:\n  max_concurrency: 8\n",
        4,
        "8: is not a list",
        "a list, such as [1, 4, 8]",
    ),
    (
        "no size",
        "serve:\n  kv_cache_memory: 512 megs\n",
        4,
        "'512 megs': doesn't have the allowed form",
        "such as 512MiB or 1.5GiB",
    ),
    (
        "a truth where a number is wanted",
        "num_epochs: no\n",
        3,
        "is a boolean (YAML reads yes, no",
        "a number",
    ),
    ("a truth that would count as 1", "lora_r: yes\n", 3, "finetune.lora_r: is a boolean", "a number"),
    (
        "none of several kinds",
        "gradient_checkpointing: x\n",
        3,
        "'x': is not one of the choices",
        "true or false, or 'auto'",
    ),
    ("not YAML", "serve: {dtype: float16\n", None, "not YAML", "spaces for indentation"),
    (
        "settled elsewhere",
        "trust_remote_code: true\n",
        3,
        "code from a model's repository is never run",
        "delete line 3",
    ),
    (
        "an image without digest",
        "serve:\n  runtime: docker\n  image: vllm/vllm-openai:latest\n",
        3,
        "sha256",
        "tunegate check",
    ),
    ("adapter and precision disagree", "adapter: qlora\nload_in_4bit: false\n", 3, "load_in_4bit", "tunegate check"),
    ("a check of nothing", "gate:\n  metrics:\n    - metric: accuracy\n", 5, "min, against, or both", "tunegate check"),
]


def broken(folder: Path, text: str) -> list[Problem]:
    """The problems of a config file with this text."""
    file = folder / "use.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load(file)
    return list(caught.value.problems)


@pytest.mark.parametrize(
    ("text", "line", "what", "help_"), [case[1:] for case in BROKEN], ids=[case[0] for case in BROKEN]
)
def test_a_defect_is_named_with_line_and_remedy(
    tmp_path: Path, text: str, line: int | None, what: str, help_: str
) -> None:
    """One defect gives one problem that names the file, the line, the defect and the way out."""
    (problem,) = broken(tmp_path, GOOD + text)
    assert problem.file == str(tmp_path / "use.yaml")
    assert problem.line == line or (line is None and problem.line)
    assert what in f"{problem.key}: {problem.what} {problem.allowed}"
    assert help_ in f"{problem.allowed} {problem.remedy}"


def test_five_mistakes_are_told_at_once_in_file_order(tmp_path: Path) -> None:
    """Nobody has to run the check five times."""
    text = "seed: x\ndatasets:\n  - path: a.jsonl\n    typ: text\nlora_r: 0\nserve: {port: 1}\ngate: {confidence: 2}\n"
    problems = broken(tmp_path, text)
    assert [problem.line for problem in problems] == [1, 4, 5, 6, 7]
    assert [problem.key for problem in problems] == [
        "seed",
        "data.datasets.0.typ",
        "finetune.lora_r",
        "serve.port",
        "gate.confidence",
    ]


def test_what_to_do_stands_once_at_the_end_as_the_command_was_given(tmp_path: Path) -> None:
    """With the data's folder and the overrides; a problem with a remedy of its own keeps it."""
    file = tmp_path / "use.yaml"
    file.write_text(GOOD + "lora_r: x\nbf16: true\nadapter: full\n", encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load(file, ["gate.confidence=2"], tmp_path / "my data")
    assert [(problem.key, problem.remedy) for problem in caught.value.problems] == [
        ("gate.confidence", None),
        ("finetune.lora_r", None),
        ("bf16", "delete line 4"),
        (
            "finetune.adapter",
            f"correct them, then: tunegate check {file} --data-dir '{tmp_path}/my data' --set gate.confidence=2",
        ),
    ]


def test_no_choice_is_told_twice(tmp_path: Path) -> None:
    """Neither beside what is allowed nor as pydantic says it."""
    (problem,) = broken(tmp_path, GOOD + "adapter: full\n")
    assert (problem.what, problem.allowed) == ("'full': is not one of the choices", "'qlora' or 'lora'")


def test_a_policy_is_checked_again_as_a_policy(tmp_path: Path) -> None:
    """A file of gate keys alone is no config."""
    file = tmp_path / "policy.yaml"
    file.write_text("confidence: yes\nload: 3\n", encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_policy(file)
    assert [(problem.line, problem.key) for problem in caught.value.problems] == [
        (1, "gate.confidence"),
        (2, "gate.load"),
    ]
    assert caught.value.problems[-1].remedy == f"correct them, then: tunegate gate --policy {file}"
    file.write_text("metrics: [{metric: accuracy, min: yes}]\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="is a boolean"):
        load_policy(file)


def test_an_empty_file_a_list_and_latin1_are_refused(tmp_path: Path) -> None:
    """What isn't a mapping of UTF-8 text is refused before anything is read from it."""
    assert "must hold keys" in broken(tmp_path, "")[0].what
    assert "must hold keys" in broken(tmp_path, "- a\n")[0].what
    file = tmp_path / "latin1.yaml"
    file.write_bytes("seed: 1\nname: caf\xe9\n".encode("latin-1"))
    with pytest.raises(ConfigError) as caught:
        load(file)
    assert caught.value.problems[0].line == 2


def test_a_missing_file_names_those_that_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistyped path is answered with the configs at hand."""
    monkeypatch.chdir(CONFIGS[0].parents[1])
    with pytest.raises(ConfigError, match=r"configs/demo\.yaml"):
        load(Path("configs/dmo.yaml"))


@pytest.mark.parametrize(
    "text", ["per_device_train_batch_size: 3\n", "micro_batch_size: 3\n", "finetune:\n  micro_batch_size: 3\n"]
)
def test_other_tools_spellings_and_flat_keys_mean_the_same(tmp_path: Path, text: str) -> None:
    """A setting may stand flat, in its section, or under TRL's name."""
    file = tmp_path / "use.yaml"
    file.write_text(GOOD + text, encoding="utf-8")
    assert load(file).finetune.micro_batch_size == 3


def test_a_llama_factory_file_is_understood(tmp_path: Path) -> None:
    """LLaMA-Factory's and TRL's names for model, dataset and adapter are read."""
    file = tmp_path / "use.yaml"
    file.write_text(
        "model_name_or_path: org/model\nmodel_revision: abc\ndataset_name: org/data\ncutoff_len: 64\nlora_rank: 4\n"
        "lora_target: [q_proj]\nquantization_bit: 4\nval_size: 0.1\n",
        encoding="utf-8",
    )
    config = load(file)
    assert (config.base_model, config.base_model_revision) == ("org/model", "abc")
    assert (config.data.datasets[0].path, config.data.sequence_len, config.data.val_set_size) == ("org/data", 64, 0.1)
    assert (config.finetune.lora_r, config.finetune.lora_target_modules, config.finetune.load_in_4bit) == (
        4,
        ("q_proj",),
        True,
    )


def test_overrides_win_and_their_mistakes_are_named(tmp_path: Path) -> None:
    """--set changes any key, flat or dotted, and a wrong one is told as such."""
    file = tmp_path / "use.yaml"
    file.write_text(GOOD, encoding="utf-8")
    config = load(file, ["max_steps=3", "serve.dtype=float16", "data.datasets.0.type=text"])
    assert (config.finetune.max_steps, config.serve.dtype, config.data.datasets[0].type) == (3, "float16", "text")
    with pytest.raises(ConfigError) as caught:
        load(file, ["max_stps=3", "nonsense"])
    assert {problem.file for problem in caught.value.problems} == {"--set"}


def test_paths_start_beside_the_file_or_in_the_data_folder(tmp_path: Path) -> None:
    """A relative dataset path is looked up where the user says, a hub id stays as it is."""
    file = tmp_path / "use.yaml"
    file.write_text("datasets:\n  - path: a/b.jsonl\n  - path: org/data\n", encoding="utf-8")
    assert [source.path for source in load(file).data.datasets] == [str(tmp_path / "a/b.jsonl"), "org/data"]
    assert load(file, data_dir=tmp_path / "d").data.datasets[0].path == str(tmp_path / "d/a/b.jsonl")


def test_benchmarks_are_found_where_the_data_is(tmp_path: Path) -> None:
    """A benchmark's path starts where a dataset's does, flat or in the section; a wrong key in it has its line."""
    file = tmp_path / "use.yaml"
    file.write_text(GOOD + "benchmarks:\n  - path: mmlu.txt\n  - path: org/benchmark\n", encoding="utf-8")
    assert [source.path for source in load(file, data_dir=tmp_path / "d").data.benchmarks] == [
        str(tmp_path / "d/mmlu.txt"),
        "org/benchmark",
    ]
    (problem,) = broken(tmp_path, GOOD + "benchmarks:\n  - path: mmlu.txt\n    column: question\n")
    assert (problem.line, problem.key, problem.allowed) == (5, "data.benchmarks.0.column", "did you mean columns?")


def test_the_name_defaults_to_the_file_and_python_tags_are_refused(tmp_path: Path) -> None:
    """A config needs no name, and YAML can't construct objects."""
    file = tmp_path / "my use.yaml"
    file.write_text(GOOD, encoding="utf-8")
    assert load(file).name == "my-use"
    file.write_text(GOOD + "seed: !!python/object/apply:os.getpid []\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=":3: seed"):
        load(file)


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.name)
def test_every_shipped_config_loads(file: Path) -> None:
    """What we ship is right by our own rules."""
    assert isinstance(load(file), Config)


def test_the_schema_knows_sections_and_flat_keys() -> None:
    """An editor completes lora_r at the top level and in its section, and every reference in the schema leads somewhere."""
    schema = json_schema()
    assert {"lora_r", "finetune", "datasets", "serve"} <= set(schema["properties"])
    assert schema["additionalProperties"] is False
    references = [part.split('"')[0] for part in str(schema).replace("'", '"').split("#/$defs/")[1:]]
    assert set(references) <= set(schema["$defs"])
