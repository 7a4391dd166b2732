"""pipeline.quantize.quantize and its parts, as far as they need no torch; test_awq.py runs the real thing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.model_folder import safetensors

from pipeline.config.schema import QuantizeConfig
from pipeline.digests import digest_file
from pipeline.errors import ConfigError, ModelError
from pipeline.quantize import quantize
from pipeline.quantize.autoawq import blocks, misread, old_form

SMOLLM2 = {
    "model.layers.0.self_attn.q_proj.weight": (576, 576),
    "model.layers.0.mlp.down_proj.weight": (576, 1536),
}


def model_folder(folder: Path, shapes: dict[str, tuple[int, ...]], **config: object) -> Path:
    """A folder with a config.json, a tokenizer, and zeros in bf16 of these shapes."""
    folder.mkdir(parents=True)
    safetensors(folder / "model.safetensors", {name: ("BF16", list(shape)) for name, shape in shapes.items()})
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    (folder / "tokenizer.json").write_bytes(b'{"odd":   "spacing\xc3\xa9"}\r\n')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


@pytest.mark.parametrize(("inputs", "chosen"), [((576, 1536), 64), ((4096, 14336), 128), ((96, 64), 32), ((128,), 128)])
def test_auto_takes_the_largest_group_that_fits(inputs, chosen):
    """group_size auto is the largest of 128, 64 and 32 that divides every layer's input size."""
    shapes = {f"layers.{index}.weight": (8, columns) for index, columns in enumerate(inputs)}
    assert quantize.choose_group_size("auto", shapes) == chosen


def test_a_fitting_group_size_is_kept():
    """A smaller group than the largest that fits is the user's choice."""
    assert quantize.choose_group_size(32, SMOLLM2) == 32


def test_a_group_size_that_does_not_fit_names_layer_and_choices():
    """The error says which layer, its size, which sizes would do, and what to write."""
    with pytest.raises(ConfigError) as caught:
        quantize.choose_group_size(128, SMOLLM2)
    problem = caught.value.problems[0]
    assert "q_proj.weight (576)" in problem.what
    assert (problem.key, problem.allowed) == ("quantize.group_size", "64, 32")
    assert problem.remedy == "set quantize.group_size: auto"


def test_a_model_that_fits_no_group_is_refused():
    """Where not even 32 divides an input size, the way out is to serve without quantization."""
    with pytest.raises(ConfigError) as caught:
        quantize.choose_group_size("auto", {"layers.0.weight": (64, 80), "layers.1.weight": (64, 80)})
    assert "and 1 more" in caught.value.problems[0].what
    assert caught.value.problems[0].remedy == "set quantize.method: none to serve the merged model"


def test_linear_layers_are_found_from_headers(tmp_path):
    """Linear layers of decoder layers count; embeddings, lm_head, norms and biases don't."""
    folder = model_folder(
        tmp_path / "model",
        {
            "model.embed_tokens.weight": (48, 20),
            "lm_head.weight": (48, 20),
            "model.norm.weight": (20,),
            "model.layers.0.input_layernorm.weight": (20,),
            "model.layers.0.self_attn.q_proj.weight": (16, 64),
            "model.layers.0.self_attn.q_proj.bias": (16,),
            "model.layers.11.mlp.down_proj.weight": (8, 96),
        },
    )
    assert quantize.linear_shapes(folder) == {
        "model.layers.0.self_attn.q_proj.weight": (16, 64),
        "model.layers.11.mlp.down_proj.weight": (8, 96),
    }


def test_layers_that_cannot_be_packed_are_all_named(tmp_path):
    """Output sizes that aren't a multiple of eight are refused, all of them, before anything is loaded."""
    shapes = {
        "model.layers.0.a.weight": (12, 64),
        "model.layers.0.b.weight": (16, 64),
        "model.layers.1.c.weight": (9, 64),
    }
    with pytest.raises(ModelError) as caught:
        quantize.linear_shapes(model_folder(tmp_path / "model", shapes))
    assert [problem.what.split(" is ")[0] for problem in caught.value.problems] == [
        "output size 12 of model.layers.0.a.weight",
        "output size 9 of model.layers.1.c.weight",
    ]


def test_the_payload_keeps_the_inputs_files(tmp_path):
    """Tokenizer and template are the input's bytes, weights the quantizer's, config.json holds no path."""
    source = model_folder(tmp_path / "source", {"a": (2,)}, _name_or_path="/a/path", rope_theta=5.0)
    made = model_folder(tmp_path / "made", {"a": (3,)})
    payload = tmp_path / "payload"
    payload.mkdir()
    weights = digest_file(made / "model.safetensors")
    quantize.assemble(source, made, {"quant_method": "awq", "bits": 4}, payload)
    assert {path.name for path in payload.iterdir()} == {path.name for path in source.iterdir()}
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (payload / name).read_bytes() == (source / name).read_bytes()
    assert digest_file(payload / "model.safetensors") == weights
    assert json.loads((payload / "config.json").read_text()) == {
        "model_type": "llama",
        "rope_theta": 5.0,
        "quantization_config": {"quant_method": "awq", "bits": 4},
    }


NEW = {"model_type": "llama", "dtype": "bfloat16", "transformers_version": "5.17.0", "hidden_size": 576}


@pytest.mark.parametrize(
    ("rope", "old"),
    [
        ({"rope_type": "default", "rope_theta": 1e5}, {"rope_theta": 1e5, "rope_scaling": None}),
        ({"rope_theta": 1e5}, {"rope_theta": 1e5, "rope_scaling": None}),
        (
            {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0},
            {
                "rope_theta": 5e5,
                "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0},
            },
        ),
        (
            {"type": "linear", "rope_theta": 1e4, "factor": 2.0, "partial_rotary_factor": 0.5},
            {
                "rope_theta": 1e4,
                "rope_scaling": {"rope_type": "linear", "factor": 2.0},
                "partial_rotary_factor": 0.5,
            },
        ),
    ],
)
def test_rope_parameters_take_the_old_form(rope, old):
    """rope_theta stands at the top level, scaling under rope_scaling, the dtype under torch_dtype."""
    written = old_form({**NEW, "rope_parameters": rope})
    assert written == {"model_type": "llama", "torch_dtype": "bfloat16", "hidden_size": 576, **old}
    assert old_form(written) == written


def test_rope_parameters_by_layer_are_refused():
    """What the old form can't say isn't handed to AutoAWQ at all."""
    by_layer = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
    with pytest.raises(ModelError, match="differ by layer"):
        old_form({**NEW, "rope_parameters": by_layer})


def test_a_misread_rope_theta_is_noticed():
    """The silent fall back to 10000, a key unknown to the old package, and nothing else, are problems."""
    config = {**NEW, "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}
    right = {"rope_theta": 100000.0, "rope_scaling": None, "hidden_size": 576, "torch_dtype": "bfloat16"}
    assert misread(config, right) == []
    assert [problem.key for problem in misread(config, {**right, "rope_theta": 10000.0})] == ["rope_theta"]
    assert [problem.key for problem in misread(config, {"hidden_size": 575})] == ["hidden_size", "rope_theta"]
    scaled = {**NEW, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e5, "factor": 2.0}}
    understood = {**right, "rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 2.0}}
    assert misread(scaled, understood) == []


def test_blocks_use_all_tokens():
    """AutoAWQ gets blocks of one length, none too long; fewer tokens are lost than there are blocks."""
    samples = [list(range(start, start + length)) for start, length in ((0, 100), (100, 37), (137, 90))]
    cut = blocks(samples, 100)
    assert {len(block) for block in cut} == {75}
    assert [token for block in cut for token in block] == list(range(225))
    assert blocks([[1, 2, 3]], 100) == [[1, 2, 3]]


def test_autoawq_without_a_zero_point_is_refused_by_the_config():
    """A setting that AutoAWQ's format can't keep is wrong before anything runs."""
    with pytest.raises(ValueError, match="zero_point"):
        QuantizeConfig(method="autoawq", zero_point=False)
    assert not QuantizeConfig(zero_point=False).zero_point
    with pytest.raises(ValueError, match="observer"):
        QuantizeConfig(method="autoawq", observer="memoryless_mse")
