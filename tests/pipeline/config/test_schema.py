"""The config's sections by themselves: bounds, rules within a section, defaults, and what an editor is told."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import ValidationError

from pipeline.config import schema
from pipeline.config.schema import (
    Config,
    ContainerConfig,
    DataConfig,
    DatasetSource,
    EnvironmentSetting,
    EvaluateConfig,
    FinetuneConfig,
    JudgeConfig,
    LoadtestConfig,
    MergeConfig,
    NotifyConfig,
    PromoteConfig,
    QuantizeConfig,
    ScheduleConfig,
    Scorer,
    ServeConfig,
    TaskConfig,
)
from pipeline.config.section import Section
from pipeline.environments import interpreters

SOURCES = [{"path": "a.jsonl"}]
JUDGE = {"base_url": "https://host/v1", "model": "m"}
TEMPLATE = {"user": "{question}", "assistant": "{answer}"}
DIGEST = f"sha256:{'0' * 64}"
SECTIONS = [
    kind
    for _, kind in inspect.getmembers(schema, inspect.isclass)
    if issubclass(kind, Section) and kind.__module__ == schema.__name__
]
WITH_DEFAULTS = [kind for kind in SECTIONS if not any(entry.is_required() for entry in kind.model_fields.values())]


def config(**sections: Any) -> Config:
    """A config with these sections beside its data."""
    return Config(**{"name": "m", "data": {"datasets": SOURCES}, **sections})


def properties() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Section, key and JSON schema of every setting."""
    whole = Config.model_json_schema()
    for name, entry in {**whole["$defs"], "Config": whole}.items():
        for key, setting in entry.get("properties", {}).items():
            yield name, key, setting


@pytest.mark.parametrize(
    ("kind", "settings", "place"),
    [
        (DataConfig, {"datasets": SOURCES, "val_set_size": -0.1}, "val_set_size"),
        (DataConfig, {"datasets": SOURCES, "val_set_size": float("nan")}, "val_set_size"),
        (DataConfig, {"datasets": SOURCES, "holdout_size": 0}, "holdout_size"),
        (DataConfig, {"datasets": SOURCES, "holdout_size": 1.5}, "holdout_size"),
        (DataConfig, {"datasets": SOURCES, "calibration_set_size": 0}, "calibration_set_size"),
        (DataConfig, {"datasets": SOURCES, "sequence_len": 15}, "sequence_len"),
        (DataConfig, {"datasets": SOURCES, "benchmark_ngram": 7}, "benchmark_ngram"),
        (DataConfig, {"datasets": SOURCES, "benchmark_ngram": 65}, "benchmark_ngram"),
        (DataConfig, {"datasets": SOURCES, "near_duplicate_threshold": 1.1}, "near_duplicate_threshold"),
        (FinetuneConfig, {"objective": "dpo"}, "objective"),
        (FinetuneConfig, {"lora_dropout": 1}, "lora_dropout"),
        (FinetuneConfig, {"num_epochs": 0}, "num_epochs"),
        (FinetuneConfig, {"learning_rate": 0}, "learning_rate"),
        (FinetuneConfig, {"max_grad_norm": 0}, "max_grad_norm"),
        (FinetuneConfig, {"weight_decay": -0.1}, "weight_decay"),
        (FinetuneConfig, {"warmup_ratio": 1.5}, "warmup_ratio"),
        (FinetuneConfig, {"max_steps": 0}, "max_steps"),
        (MergeConfig, {"merge_base": "nf4"}, "merge_base"),
        (QuantizeConfig, {"num_calibration_samples": 0}, "num_calibration_samples"),
        (ContainerConfig, {"ulimits": {"nofile": 0}}, "ulimits"),
        (ContainerConfig, {"shm_size": "1GB"}, "shm_size"),
        (ServeConfig, {"runtime": "podman"}, "runtime"),
        (ServeConfig, {"kv_cache_memory": "1"}, "kv_cache_memory"),
        (ServeConfig, {"tensor_parallel_size": 0}, "tensor_parallel_size"),
        (ServeConfig, {"dtype": "int8"}, "dtype"),
        (TaskConfig, {"task": "gsm8k", "num_fewshot": -1}, "num_fewshot"),
        (TaskConfig, {"task": "gsm8k", "limit": 0}, "limit"),
        (JudgeConfig, {**JUDGE, "criteria": ""}, "criteria"),
        (JudgeConfig, {**JUDGE, "against": "merged"}, "against"),
        (JudgeConfig, {**JUDGE, "api_key_env": "sk-1"}, "api_key_env"),
        (EvaluateConfig, {"compare": ["incumbent"]}, "compare"),
        (EvaluateConfig, {"ledger_items": -1}, "ledger_items"),
        (LoadtestConfig, {"max_concurrency": [1, 0]}, "max_concurrency"),
        (LoadtestConfig, {"cost_per_hour": 0}, "cost_per_hour"),
        (PromoteConfig, {"port": 0}, "port"),
        (PromoteConfig, {"port": 65536}, "port"),
    ],
)
def test_a_setting_past_its_bounds_is_refused_by_its_key(kind, settings, place):
    """That one alone."""
    with pytest.raises(ValidationError) as error:
        kind(**settings)
    assert {problem["loc"][0] for problem in error.value.errors()} == {place}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (DataConfig, {"datasets": SOURCES, "val_set_size": 0, "holdout_size": 200, "sequence_len": 16}),
        (DataConfig, {"datasets": SOURCES, "benchmark_ngram": 8}),
        (DataConfig, {"datasets": SOURCES, "benchmark_ngram": 64}),
        (FinetuneConfig, {"lora_dropout": 0, "weight_decay": 0, "warmup_ratio": 1}),
        (FinetuneConfig, {"gradient_checkpointing": "auto"}),
        (FinetuneConfig, {"gradient_checkpointing": False}),
        (TaskConfig, {"task": "gsm8k", "num_fewshot": 0}),
        (EvaluateConfig, {"ledger_items": 0, "compare": []}),
        (PromoteConfig, {"port": 1}),
        (PromoteConfig, {"port": 65535}),
    ],
)
def test_a_setting_on_its_bound_is_taken_as_it_is(kind, settings):
    """Nothing is rounded, clipped or made a truth."""
    assert kind(**settings).model_dump(mode="json", include=set(settings), exclude_unset=True) == settings


@pytest.mark.parametrize("name", ["m", "my-model_1.5", "0", "a" * 63])
def test_a_models_name_may_be_a_label(name):
    """Up to 63 letters."""
    assert config(name=name).name == name


@pytest.mark.parametrize("name", ["", "-m", ".m", "a b", "a/b", "a" * 64, "m\n", "Ü"])
def test_a_models_name_is_no_path_and_no_flag(name):
    """It becomes a folder, an argument and a part of an address."""
    with pytest.raises(ValidationError, match="name"):
        config(name=name)


def test_name_and_data_are_all_that_must_be_said():
    """Every other section has defaults, and no cluster is made up."""
    assert [key for key, entry in Config.model_fields.items() if entry.is_required()] == ["name", "data"]
    assert config().kubernetes is None
    with pytest.raises(ValidationError, match="datasets needs at least one entry"):
        DataConfig(datasets=[])


@pytest.mark.parametrize("kind", WITH_DEFAULTS, ids=lambda kind: kind.__name__)
def test_defaults_hold_by_a_sections_own_rules(kind):
    """Pydantic doesn't look at most of them; a config that was printed with them loads again."""
    section = kind()
    assert kind.model_validate(section.model_dump()) == section


def test_a_whole_config_comes_back_from_json_as_it_went():
    """As every stage is handed it and the registry keeps it."""
    whole = config(
        serve={"runtime": "docker", "image": f"vllm@{DIGEST}", "extra_args": {"a": 1, "b": True, "c": "x", "d": 0.5}},
        evaluate={"judges": [JUDGE], "tasks": [{"task": "gsm8k"}], "scorers": [{"metric": "json_valid"}]},
        environments={"train": {"interpreter": "python3.12"}},
        kubernetes={"image": f"tunegate@{DIGEST}"},
    )
    again = Config.model_validate_json(whole.model_dump_json())
    assert again == whole
    assert [type(setting) for setting in again.serve.extra_args.values()] == [int, bool, str, float]


@pytest.mark.parametrize("kind", SECTIONS, ids=lambda kind: kind.__name__)
def test_every_section_is_closed_and_does_not_change(kind):
    """Also one that is added later."""
    assert (kind.model_config.get("extra"), kind.model_config.get("frozen")) == ("forbid", True)
    with pytest.raises(ValidationError) as error:
        kind.model_validate({"no_such_key": 1})
    assert ("no_such_key",) in [
        problem["loc"] for problem in error.value.errors() if problem["type"] == "extra_forbidden"
    ]


def test_a_template_and_columns_go_together():
    """A template for rows of another format would be passed over, and columns without one can't be read."""
    assert DatasetSource(path="a.csv", type="columns", template=TEMPLATE).template
    for settings in ({"type": "columns"}, {"template": TEMPLATE}, {"type": "messages", "template": TEMPLATE}):
        with pytest.raises(ValidationError, match="template and type: columns go together"):
            DatasetSource(path="a.csv", **settings)


@pytest.mark.parametrize(("adapter", "load_in_4bit", "fits"), [
    ("qlora", True, True), ("lora", False, True), ("qlora", False, False), ("lora", True, False),
])  # fmt: skip
def test_adapter_and_bits_say_the_same(adapter, load_in_4bit, fits):
    """The Q of QLoRA is the four bits."""
    settings = {"adapter": adapter, "load_in_4bit": load_in_4bit}
    if fits:
        assert FinetuneConfig(**settings).adapter == adapter
    else:
        with pytest.raises(ValidationError, match="adapter: qlora goes with load_in_4bit: true"):
            FinetuneConfig(**settings)


def test_each_process_has_a_row_of_a_step():
    """Without packing there are as many rows as the batch has, over all of its accumulation; packed rows aren't counted so."""
    rows = {"micro_batch_size": 2, "gradient_accumulation_steps": 2}
    assert FinetuneConfig(**rows, num_processes=4, sample_packing=False).num_processes == 4
    assert FinetuneConfig(**rows, num_processes=5, sample_packing=True).num_processes == 5
    with pytest.raises(ValidationError, match="is 4 for all processes together"):
        FinetuneConfig(**rows, num_processes=5, sample_packing=False)


def test_a_base_is_split_over_more_than_one_process():
    """And by the one version of FSDP that there is."""
    assert FinetuneConfig(num_processes=2, fsdp_version=2).fsdp_version == 2
    with pytest.raises(ValidationError, match="num_processes is 1"):
        FinetuneConfig(fsdp_version=2)
    with pytest.raises(ValidationError, match="fsdp_version"):
        FinetuneConfig(num_processes=2, fsdp_version=1)


@pytest.mark.parametrize("image", [None, "", "vllm/vllm-openai:v1", "sha256:0"])
def test_a_container_is_of_a_pinned_image(image):
    """Another image under the same tag would be another served unit; a process needs none."""
    assert ServeConfig(runtime="docker", image=f"vllm/vllm-openai@{DIGEST}").image
    assert ServeConfig(runtime="process", image=image).image == image
    with pytest.raises(ValidationError, match="runtime: docker needs image: name@sha256:digest"):
        ServeConfig(runtime="docker", image=image)


def test_a_server_in_a_container_is_not_root():
    """Neither as a user nor as a group, and by numbers alone."""
    assert ContainerConfig(user="1000:100").user == "1000:100"
    for user in ("0:0", "0:1000", "1000:0", "root:root", "1000", "01:1", "1000:1000\n"):
        with pytest.raises(ValidationError, match="user"):
            ContainerConfig(user=user)


@pytest.mark.parametrize("address", ["http://localhost:8000", "https://host/v1", "https://host/a/b/"])
def test_a_judges_address_is_as_clients_take_it(address):
    """With or without a path."""
    assert JudgeConfig(base_url=address, model="m").base_url == address


@pytest.mark.parametrize(
    "address",
    [
        "host/v1",
        "ftp://host",
        "https://",
        "https://key@host/v1",
        "https://host/v1?key=x",
        "https://host/v1#a",
        "https://a b",
    ],
)
def test_a_judges_address_holds_no_key(address):
    """It stands in reports; a user, a query or a fragment is refused."""
    with pytest.raises(ValidationError, match="base_url"):
        JudgeConfig(base_url=address, model="m")


def test_a_task_and_a_judges_system_stand_once():
    """Their checks go by these names."""
    tasks = [{"task": "gsm8k"}, {"task": "mmlu"}, {"task": "gsm8k", "limit": 3}]
    with pytest.raises(ValidationError, match="tasks names gsm8k more than once"):
        EvaluateConfig(tasks=tasks)
    with pytest.raises(ValidationError, match="judges has more than one against base"):
        EvaluateConfig(judges=[JUDGE, {**JUDGE, "model": "n"}])
    section = EvaluateConfig(tasks=tasks[:2], judges=[JUDGE, {**JUDGE, "against": "incumbent"}])
    assert (len(section.tasks), len(section.judges)) == (2, 2)


def test_what_is_measured_unless_one_says_so():
    """Exact answers of the base and of the merged model, with a ledger and no outside judge."""
    section = EvaluateConfig()
    assert section.scorers == (Scorer(metric="exact_match"),)
    assert (section.compare, section.ledger_items, section.tasks, section.judges) == (("base", "merged"), 100, (), ())


def test_nothing_listens_off_loopback_or_calls_anybody_unless_one_says_so():
    """No webhook, no schedule, the proxy on this host alone, a container's port too."""
    assert PromoteConfig().host == "127.0.0.1"
    assert (NotifyConfig().webhook_env, ScheduleConfig().cron, ScheduleConfig().timezone) == (None, None, "UTC")
    assert ServeConfig().container.network == "published"


def test_an_interpreter_may_be_ones_own_for_every_environment_but_controls():
    """Control is the one that is running."""
    settings = {name: {"pythonpath": ["a"]} for name in interpreters.NAMES if name != "control"}
    assert config(environments=settings).environments["train"] == EnvironmentSetting(pythonpath=("a",))
    assert config(environments=settings).environments.keys() == settings.keys()
    with pytest.raises(ValidationError, match=r"environments\.control"):
        config(environments={"control": {}})


def test_every_section_is_explained_in_a_sentence():
    """An editor shows it over the key."""
    definitions = Config.model_json_schema()["$defs"]
    assert {kind.__name__ for kind in SECTIONS} - {"Config"} <= definitions.keys()
    assert all(entry["description"] != Section.__doc__ for entry in definitions.values() if "properties" in entry)
    assert all(entry["description"].endswith(".") for entry in definitions.values() if "properties" in entry)


@pytest.mark.parametrize("ending", ["_env", "_size", "_timeout", "_items", "revision", "split"])
def test_keys_whose_name_leaves_something_open_are_described(ending):
    """Which variable, how many seconds, rows or parts."""
    matches = {f"{section}.{key}": setting for section, key, setting in properties() if key.endswith(ending)}
    silent = {place for place, setting in matches.items() if not setting.get("description")}
    assert silent <= {
        "FinetuneConfig.micro_batch_size",
        "QuantizeConfig.group_size",
        "ServeConfig.tensor_parallel_size",
    }
    assert matches.keys() > silent
