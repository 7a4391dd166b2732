"""The table of quantization methods, and everything that takes its choices from it."""

from __future__ import annotations

import importlib.util
import json
from typing import get_args

import pytest
from pydantic import ValidationError

from pipeline.config import file, methods
from pipeline.config.schema import Config, QuantizeConfig
from pipeline.environments import interpreters
from pipeline.errors import ConfigError
from pipeline.plan import steps

PAIRS = pytest.mark.parametrize("pair", list(methods.METHODS), ids="-".join)


def choices(field: str) -> set[str]:
    """The words that the config allows for a field of section quantize."""
    annotation = QuantizeConfig.model_fields[field].annotation
    parts = [get_args(part) or (part,) for part in get_args(annotation)]
    return {word for part in parts for word in part if isinstance(word, str)}


def test_the_configs_choices_are_the_tables():
    """Methods and backends, no more and no fewer."""
    assert choices("method") == set(methods.names())
    assert choices("backend") == {backend for _, backend in methods.METHODS}


@PAIRS
def test_the_plan_takes_environment_and_packages_from_the_table(pair):
    """The quantize step of a config with this method and backend; its environment exists, and so does its module."""
    section = QuantizeConfig(method=pair[0], backend=pair[1]).model_dump(mode="json")
    (step,) = (step for step in steps.steps({"quantize": section}) if step.stage == "quantize")
    method = methods.METHODS[pair]
    assert step.environment == method.environment
    assert step.environment in interpreters.NAMES
    assert step.packages[-len(method.packages) :] == method.packages
    assert importlib.util.find_spec(method.program)
    assert steps.served_stage({"quantize": section}) == "quantize"


@PAIRS
def test_settings_of_the_table_are_settings_of_the_config(pair):
    """Those that a module takes and those with one value; that value is the default, else no default config would load."""
    method = methods.METHODS[pair]
    assert set(method.settings) | method.fixed.keys() <= QuantizeConfig.model_fields.keys()
    assert all(QuantizeConfig.model_fields[name].default == only for name, (only, _) in method.fixed.items())


def test_labels_name_method_and_tool():
    """METHOD, TOOL; no two are the same."""
    labels = [method.label for method in methods.METHODS.values()]
    assert len(set(labels)) == len(labels)
    assert all(label.count(", ") == 1 for label in labels)
    assert {method.title for method in methods.METHODS.values()} == {"AWQ"}


@pytest.mark.parametrize(
    ("section", "pair"),
    [
        ({}, ("awq", "llmcompressor")),
        ({"method": "awq"}, ("awq", "llmcompressor")),
        ({"backend": "autoawq"}, ("awq", "autoawq")),
        ({"method": "llmcompressor"}, ("awq", "llmcompressor")),
        ({"method": "autoawq"}, ("awq", "autoawq")),
        ({"method": "autoawq", "backend": "autoawq"}, ("awq", "autoawq")),
        ({"method": "none"}, ("none", None)),
        ({"method": "none", "backend": None}, ("none", None)),
    ],
)
def test_old_spellings_are_aliases(section, pair):
    """Version 0.1 named the backend as the method; a resolved section resolves to itself."""
    config = QuantizeConfig(**section)
    assert (config.method, config.backend) == pair
    assert QuantizeConfig.model_validate_json(config.model_dump_json()) == config
    if "method" in section:
        assert methods.named(section) == (None if pair[0] == "none" else pair)


def test_a_resolved_config_of_version_0_1_still_loads():
    """A registry's config.json with the old spelling and no backend."""
    config = Config(name="m", data={"datasets": [{"path": "a.jsonl"}]}).model_dump(mode="json")
    old = {**config, "quantize": {**config["quantize"], "method": "autoawq"}}
    del old["quantize"]["backend"]
    quantize = Config.model_validate_json(json.dumps(old)).quantize
    assert (quantize.method, quantize.backend) == ("awq", "autoawq")


@pytest.mark.parametrize(
    ("section", "key", "line", "words"),
    [
        ("method: autoawq\n  backend: llmcompressor", "quantize.method", 4, "write method: awq and one backend"),
        ("method: none\n  backend: autoawq", "quantize.backend", 5, "delete it"),
        ("backend: autoawq\n  zero_point: false", "quantize.zero_point", 5, "must be true with backend: autoawq"),
        ("method: gptqmodel", "quantize.method", 4, "not one of the choices"),
    ],
)
def test_contradictions_are_errors_with_file_key_and_remedy(tmp_path, section, key, line, words):
    """A backend beside an alias of another, or beside none, isn't dropped."""
    path = tmp_path / "use.yaml"
    path.write_text(f"data:\n  datasets: [{{path: a.jsonl}}]\nquantize:\n  {section}\n")
    with pytest.raises(ConfigError) as error:
        file.load(path)
    (problem,) = error.value.problems
    assert (problem.file, problem.key, problem.line) == (str(path), key, line)
    assert words in problem.what
    assert problem.remedy


def test_formats_of_the_table_decide_the_served_precision():
    """AutoAWQ's format in 16 bits; plain and compressed-tensors models in any."""
    assert methods.needs_16_bits("awq")
    assert not methods.needs_16_bits("compressed-tensors")
    assert not methods.needs_16_bits(None)


def test_a_pair_that_the_table_lacks_is_refused():
    """By the config, and by the table itself."""
    with pytest.raises(ValidationError):
        QuantizeConfig(method="awq", backend="gptqmodel")
    with pytest.raises(KeyError):
        methods.of({"method": "awq", "backend": "gptqmodel"})
