"""The flags and the environment of a served unit, and what a config may not add to them."""

from __future__ import annotations

import pytest

from pipeline.config.schema import ServeConfig
from pipeline.errors import ConfigError
from pipeline.serving import command


def problems(**fields):
    """The problems of a serve section, by key."""
    serve = ServeConfig(**fields)
    found = {}
    parts = (command.unit_flags, "name"), (command.unit_env, True)
    for part, argument in parts:
        try:
            part(serve, argument) if argument == "name" else part(serve, on_cpu=True)
        except ConfigError as error:
            found |= {problem.key: problem for problem in error.problems}
    return found


def test_every_setting_is_a_flag_sorted_and_in_bytes():
    """The unit's flags are the same whatever the order of the config, sizes are in bytes."""
    serve = ServeConfig(kv_cache_memory="1.5GiB", enforce_eager=True, max_model_len=512, max_num_seqs=8)
    assert command.unit_flags(serve, "tickets") == (
        "--dtype=bfloat16",
        "--enforce-eager",
        "--generation-config=vllm",
        "--kv-cache-memory-bytes=1610612736",
        "--load-format=safetensors",
        "--max-model-len=512",
        "--max-num-seqs=8",
        "--served-model-name=tickets",
        "--tensor-parallel-size=1",
    )


def test_the_name_clients_ask_for_is_the_configs_or_the_models():
    """served_model_name wins over the registered name."""
    flags = command.unit_flags(ServeConfig(served_model_name="triage"), "tickets")
    assert "--served-model-name=triage" in flags


def test_extra_arguments_become_flags():
    """Underscores or dashes, true as a bare flag, false as none."""
    extra = {
        "max_num_batched_tokens": 4096,
        "enable-prefix-caching": True,
        "async-scheduling": False,
        "seed": 7,
    }
    flags = command.unit_flags(ServeConfig(extra_args=extra), "n")
    assert {"--max-num-batched-tokens=4096", "--enable-prefix-caching", "--seed=7"} <= set(flags)
    assert not any("async" in flag for flag in flags)


def test_host_port_path_and_timeouts_are_in_the_command_and_not_in_the_unit():
    """The list of what is left out is kept to, and nothing else is added."""
    serve = ServeConfig()
    flags = command.unit_flags(serve, "n")
    line = command.arguments(flags, "/model", "127.0.0.1", 8123, 60)
    added = {word.partition("=")[0] for word in line if word not in flags}
    assert added == set(command.LEFT_OUT)
    assert not any(flag.startswith(command.LEFT_OUT) for flag in flags)


def test_no_share_of_a_gpu_must_be_free_unless_the_config_asks_for_one():
    """The KV cache is given in bytes, so that a new server starts beside the old one; a share in the config is kept to."""
    without = command.arguments(command.unit_flags(ServeConfig(), "n"), "model", "127.0.0.1", 1, 60)
    assert command.NO_SHARE in without
    flags = command.unit_flags(ServeConfig(extra_args={"gpu_memory_utilization": 0.5}), "n")
    given = command.arguments(flags, "model", "127.0.0.1", 1, 60)
    assert [word for word in given if "utilization" in word] == ["--gpu-memory-utilization=0.5"]


@pytest.mark.parametrize(
    "flag",
    ["trust-remote-code", "trust_remote_code", "no-trust-remote-code", "host", "port", "api-key", "model",
     "load-format", "tokenizer", "chat-template", "middleware", "worker-cls", "lora-modules", "config", "hf-token", "uds",
     "speculative-config", "allowed-local-media-path", "disable-log-stats", "logits-processors", "generation-config", "hf_config_path",
     "speculative-config.model"],
)  # fmt: skip
def test_arguments_that_break_the_promise_are_refused(flag):
    """Each with its key and what to do."""
    found = problems(extra_args={flag: "x"})
    assert list(found) == [f"serve.extra_args.{flag}"]
    assert found[f"serve.extra_args.{flag}"].remedy


def test_an_argument_with_a_setting_of_its_own_names_it():
    """So that it isn't given twice."""
    assert (
        problems(extra_args={"max_model_len": 5})["serve.extra_args.max_model_len"].remedy == "set serve.max_model_len"
    )


def test_an_unknown_argument_gets_a_suggestion():
    """A misspelt flag is told before vLLM is started."""
    found = problems(extra_args={"max-num-batched-token": 5})["serve.extra_args.max-num-batched-token"]
    assert "did you mean max-num-batched-tokens?" in found.allowed


def test_a_value_that_names_a_file_is_refused(tmp_path):
    """Its bytes are in no digest."""
    file = tmp_path / "x.json"
    file.write_text("{}")
    found = problems(extra_args={"compilation-config": str(file), "hf-overrides": "../y"})
    assert len(found) == 2
    command.unit_flags(ServeConfig(extra_args={"hf-overrides": '{"rope_theta": 1e4}'}), "n")


@pytest.mark.parametrize(
    "variable",
    ["VLLM_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "PYTHONPATH", "LD_PRELOAD", "PATH", "VLLM_PLUGINS",
     "VLLM_ALLOW_INSECURE_SERIALIZATION", "VLLM_ALLOW_RUNTIME_LORA_UPDATING", "VLLM_SERVER_DEV_MODE",
     "VLLM_CACHE_ROOT", "VLLM_CPU_KVCACHE_SPACE", "VLLM_MY_TOKEN", "HTTP_PROXY", "TORCHINDUCTOR_CACHE_DIR"],
)  # fmt: skip
def test_dangerous_secret_and_foreign_variables_are_refused(variable):
    """No secret, no path, no door, no code comes in by the environment."""
    assert list(problems(env={variable: "1"})) == [f"serve.env.{variable}"]


def test_variables_of_computing_are_part_of_the_unit():
    """They stand beside what a CPU needs, and win over it."""
    serve = ServeConfig(env={"VLLM_CPU_INT4_W4A8": "0", "OMP_NUM_THREADS": "2"})
    assert command.unit_env(serve, on_cpu=False) == {
        "VLLM_CPU_INT4_W4A8": "0",
        "OMP_NUM_THREADS": "2",
    }
    on_cpu = command.unit_env(serve, on_cpu=True)
    assert on_cpu == {**command.CPU_ENV, "VLLM_CPU_INT4_W4A8": "0", "OMP_NUM_THREADS": "2"}


def test_all_mistakes_come_at_once():
    """Five wrong arguments are five problems."""
    found = problems(extra_args={"host": "x", "port": 1, "nonsense": 1, "dtype": "x", "config": "y"})
    assert len(found) == 5
