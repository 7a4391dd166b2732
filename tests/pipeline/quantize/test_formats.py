"""pipeline.quantize.formats on weights packed by hand, bit by bit, and on folders that don't fit their model."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace

import pytest
from support.programs import python

from pipeline.quantize import formats

UNPACK = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from pipeline.errors import ModelError
from pipeline.quantize import formats
answers = {}
for name, (stored, shapes) in json.loads(Path(sys.argv[1], "asked.json").read_text()).items():
    folder = Path(sys.argv[1], name)
    folder.mkdir()
    tensors = {key: torch.tensor(rows, dtype=getattr(torch, dtype)) for key, (dtype, rows) in stored.items()}
    save_file(tensors, folder / "model.safetensors")
    model = torch.nn.Module()
    model.device = torch.device("cpu")
    model.named_parameters = lambda: [(key, torch.nn.Parameter(torch.zeros(shape))) for key, shape in shapes.items()]
    try:
        if shapes:
            formats.load_dequantized(model, folder)
        answers[name] = {key: [str(tensor.dtype), tensor.tolist()] for key, tensor in formats.dequantized(folder)}
    except ModelError as error:
        answers[name] = [problem.what for problem in error.problems]
print(json.dumps(answers))
"""
OUT, IN, GROUP = 16, 24, 8
AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)
NAN, INFINITE = float("nan"), float("inf")
GENERATOR = random.Random(5)
NIBBLES = [[GENERATOR.randrange(16) for _ in range(IN)] for _ in range(OUT)]
ZEROS = [[GENERATOR.randrange(16) for _ in range(IN // GROUP)] for _ in range(OUT)]
SCALES = [[GENERATOR.randrange(1, 64) / 64 for _ in range(IN // GROUP)] for _ in range(OUT)]


def word(nibbles: list[int]) -> int:
    """Eight 4-bit values as one int32, the first in the lowest bits."""
    bits = sum(nibble << 4 * place for place, nibble in enumerate(nibbles))
    return bits - 2**32 if bits >= 2**31 else bits


def packed_rows(rows: list[list[int]], order: tuple[int, ...] = tuple(range(8))) -> list[list[int]]:
    """Each row's eights as words, nibble i of a word being the value at order[i]; a short end is filled with zeros."""
    whole_words = [row + [0] * (-len(row) % 8) for row in rows]
    return [[word([row[at + place] for place in order]) for at in range(0, len(row), 8)] for row in whole_words]


def turned(rows: list[list]) -> list[list]:
    """The transpose."""
    return [list(column) for column in zip(*rows, strict=True)]


def meaning(outputs: int = OUT, zeros: list[list[int]] = ZEROS) -> list[list[float]]:
    """(value - zero) * scale by the definition, for the first outputs; exact in float32."""
    return [
        [(NIBBLES[row][at] - zeros[row][at // GROUP]) * SCALES[row][at // GROUP] for at in range(IN)]
        for row in range(outputs)
    ]


def compressed(outputs: int = OUT, *, zero_points: bool = True) -> dict[str, list]:
    """The first outputs as compressed-tensors stores them."""
    zeros = {"a.weight_zero_point": ["int32", turned(packed_rows(turned(ZEROS[:outputs])))]} if zero_points else {}
    return {
        "a.weight_packed": ["int32", packed_rows(NIBBLES[:outputs])],
        "a.weight_scale": ["bfloat16", SCALES[:outputs]],
        "a.weight_shape": ["int64", [outputs, IN]],
        **zeros,
    }


def awq() -> dict[str, list]:
    """All outputs as AutoAWQ stores them."""
    return {
        "a.qweight": ["int32", packed_rows(turned(NIBBLES), AWQ_COLUMNS)],
        "a.qzeros": ["int32", packed_rows(turned(ZEROS), AWQ_COLUMNS)],
        "a.scales": ["float16", turned(SCALES)],
    }


NORM = {"norm.weight": ["bfloat16", [1.0, 2.0]], "steps": ["int64", [7]]}
BROKEN = {
    "a.weight_scale": ["float32", [[-1.0, 0.0, NAN], *SCALES[1:]]],
    "norm.weight": ["bfloat16", [1.0, INFINITE]],
}
ASKED = {
    "compressed": ({**compressed(), **NORM}, {}),
    "uneven": (compressed(12), {}),
    "symmetric": (compressed(zero_points=False), {}),
    "awq": (awq(), {}),
    "broken": ({**compressed(), **NORM, **BROKEN}, {}),
    "fits": (awq(), {"a.weight": [OUT, IN]}),
    "other": ({**awq(), "norm.weight": ["bfloat16", [1.0, 2.0]]}, {"a.weight": [IN, OUT], "b": [2], "c": [1]}),
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> dict:
    """By case, each tensor's dtype and values, or what was wrong."""
    folder = tmp_path_factory.mktemp("formats")
    (folder / "asked.json").write_text(json.dumps(ASKED))
    return json.loads(python(UNPACK, folder).splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "weights"),
    [
        ("compressed", meaning()),
        ("uneven", meaning(12)),
        ("symmetric", meaning(zeros=[[8] * (IN // GROUP)] * OUT)),
        ("awq", meaning()),
    ],
)
def test_packed_weights_mean_what_the_format_says(answers, case, weights):
    """Exactly: in both formats, with outputs that fill no word of zero points, and without zero points, where 8 is zero."""
    assert answers[case]["a.weight"] == ["torch.float32", weights]


@pytest.mark.slow
def test_other_tensors_come_as_they_are_and_parts_do_not_come(answers):
    """Norms keep their dtype, whole numbers too; scales and zero points are no tensors of the model."""
    assert answers["compressed"].keys() == {"a.weight", "norm.weight", "steps"}
    assert answers["compressed"]["norm.weight"] == ["torch.bfloat16", [1.0, 2.0]]
    assert answers["compressed"]["steps"] == ["torch.int64", [7]]
    assert answers["awq"].keys() == {"a.weight"}


@pytest.mark.slow
def test_every_broken_tensor_is_named(answers):
    """A NaN, scales that are zero or negative, and an infinity, in one error."""
    assert answers["broken"] == [
        "a.weight_scale: 1 of 48 values are NaN or infinite",
        "a.weight_scale: 2 scales aren't positive",
        "norm.weight: 1 of 2 values are NaN or infinite",
    ]


@pytest.mark.slow
def test_a_folder_that_does_not_fit_the_model_says_all_that_differs(answers):
    """Another shape, a tensor unknown to the model, and every one that is missing; a fitting folder is loaded."""
    assert answers["fits"]["a.weight"] == ["torch.float32", meaning()]
    assert answers["other"] == [
        "a.weight of shape (16, 24) is of shape (24, 16) there",
        "norm.weight of shape (2,) is unknown to the model",
        "a.weight is missing",
        "b is missing",
        "c is missing",
    ]


def test_the_folders_own_configuration_is_read(tmp_path):
    """Only its section quantization_config; a plain model's folder has none."""
    config = {"model_type": "llama", "quantization_config": {"quant_method": "awq", "bits": 4}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert formats.quantization_of(tmp_path) == {"quant_method": "awq", "bits": 4}
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(KeyError):
        formats.quantization_of(tmp_path)


def test_decoder_layers_are_those_of_the_decoder():
    """In order, wherever the model keeps its decoder."""
    model = SimpleNamespace(get_decoder=lambda: SimpleNamespace(layers=("first", "second")))
    assert formats.decoder_layers(model) == ["first", "second"]
