"""The flags and the environment of a served unit, and what a config may not add to them."""

from __future__ import annotations

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
