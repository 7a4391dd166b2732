from __future__ import annotations

import json

import pytest
from support import model_folder

from pipeline.errors import ModelError
from pipeline.model import weights


def test_header_gives_names_dtypes_and_shapes(tmp_path):
    """A file's header alone tells its tensors."""
    path = model_folder.safetensors(tmp_path / "a.safetensors", {"x": ("BF16", [2, 3]), "y": ("F32", [])})
    assert weights.read_header(path) == {
        "x": weights.Tensor("x", "BF16", (2, 3)),
        "y": weights.Tensor("y", "F32", ()),
    }


@pytest.mark.parametrize(
    ("header", "data", "said"),
    [
        (b"not json", b"", "isn't JSON"),
        (b"[1]", b"", "isn't a JSON object"),
        (b'{"x": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 2]}}', b"ab", "don't fit its shape"),
        (b'{"x": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]}}', b"abcd", "the file holds 4"),
        (b'{"x": {"dtype": "BF16", "shape": [1], "data_offsets": [2, 4]}}', b"abcd", "overlap or leave gaps"),
        (b'{"x": {"dtype": "PICKLE", "shape": [1], "data_offsets": [0, 2]}}', b"ab", "described wrongly"),
        (b'{"x": {"dtype": "BF16", "shape": [0], "data_offsets": [0, 0]}, "x": {}}', b"", "appears twice"),
        (b'{"x": 1}', b"", "described wrongly"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path, header, data, said):
    """A header must be JSON and cover the file's bytes exactly."""
    path = tmp_path / "a.safetensors"
    path.write_bytes(model_folder.safetensors_bytes(header, data))
    with pytest.raises(weights.BadHeader, match=said):
        weights.read_header(path)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 a zip archive", b"\xff" * 64])
def test_what_is_no_safetensors_file_is_refused(tmp_path, content):
    """A renamed pickle, an empty file or noise is told from safetensors by its first bytes."""
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(weights.BadHeader, match="isn't a safetensors file, or was cut off"):
        weights.read_header(tmp_path / "a.safetensors")


def test_index_names_the_shards_and_missing_ones_are_all_told(tmp_path):
    """An index that names files which aren't there, or lie elsewhere, stops with their names."""
    model_folder.safetensors(tmp_path / "model-1.safetensors", {"a": ("BF16", [1])})
    names = {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "../model-3.safetensors"}
    (tmp_path / weights.INDEX).write_text(json.dumps({"weight_map": names}))
    with pytest.raises(ModelError) as error:
        weights.files(tmp_path)
    assert "../model-3.safetensors, model-2.safetensors" in str(error.value)


def test_names_are_ordered_by_number():
    """Layer 2 comes before layer 10."""
    names = ["layers.10.a", "layers.2.b", "layers.2.a", "embed", "layers.b"]
    assert weights.in_order(dict.fromkeys(names, ())) == [
        "embed",
        "layers.2.a",
        "layers.2.b",
        "layers.10.a",
        "layers.b",
    ]
