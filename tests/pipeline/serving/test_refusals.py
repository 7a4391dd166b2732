"""The flags and variables that a config may not add to a served unit, each with its reason and a remedy."""

from __future__ import annotations

import pytest

from pipeline.serving import refusals


def problems(extra_args=None, env=None):
    """The problems of a serve section, by key."""
    entries = [*refusals.argument_problems(extra_args or {}), *refusals.env_problems(env or {})]
    return {problem.key: problem for problem in entries}


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
    assert problems(extra_args={"hf-overrides": '{"rope_theta": 1e4}'}) == {}


@pytest.mark.parametrize(
    "variable",
    ["VLLM_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "PYTHONPATH", "LD_PRELOAD", "PATH", "VLLM_PLUGINS",
     "VLLM_ALLOW_INSECURE_SERIALIZATION", "VLLM_ALLOW_RUNTIME_LORA_UPDATING", "VLLM_SERVER_DEV_MODE",
     "VLLM_CACHE_ROOT", "VLLM_CPU_KVCACHE_SPACE", "VLLM_MY_TOKEN", "HTTP_PROXY", "TORCHINDUCTOR_CACHE_DIR"],
)  # fmt: skip
def test_dangerous_secret_and_foreign_variables_are_refused(variable):
    """No secret, no path, no door, no code comes in by the environment."""
    assert list(problems(env={variable: "1"})) == [f"serve.env.{variable}"]


def test_the_lists_do_not_contradict_each_other():
    """A flag is allowed, refused or the config's own, never two of them."""
    lists = [refusals.ALLOWED, set(refusals.OWNED), set(refusals.REFUSED)]
    assert sum(map(len, lists)) == len(set().union(*lists))


@pytest.mark.parametrize(("name", "number"), [("OMP_NUM_THREADS", "two\nlines"), ("VLLM_CPU_INT4_W4A8", "0\0")])
def test_a_variable_is_one_line(name, number):
    """A line break or a zero byte could hide another variable."""
    problem = problems(env={name: number})[f"serve.env.{name}"]
    assert (problem.what, problem.remedy) == ("must be one line", "remove the line break")


def test_an_allowed_setting_is_no_problem():
    """Underscores or dashes, bare or with a value; a variable of computing."""
    assert (
        problems({"enable_prefix_caching": True, "seed": 7, "hf-overrides": '{"a": 1}'}, {"OMP_NUM_THREADS": "2"}) == {}
    )
