"""pipeline.model.checkpoint, as far as it needs no torch; test_base.py copies whole folders with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import model_folder

from pipeline.model import checkpoint


def test_the_configuration_is_spelled_for_both_versions() -> None:
    """rope_parameters, the form of transformers 5, is repeated at the top level for 4; the rest stays."""
    spelled = checkpoint.both_spellings(
        {"model_type": "llama", "rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0}}
    )
    assert (spelled["model_type"], spelled["rope_theta"]) == ("llama", 5e5)
    assert spelled["rope_scaling"] == {"rope_type": "llama3", "factor": 8.0}
    assert spelled["dtype"] == spelled["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("rope", [None, {"full_attention": {"rope_theta": 1e4}}, "linear"])
def test_other_forms_of_rope_stay_as_they_are(rope: object) -> None:
    """An old configuration, and one by layer type, get no theta that they don't state."""
    spelled = checkpoint.both_spellings({"rope_parameters": rope})
    assert spelled["rope_parameters"] == rope
    assert not spelled.keys() & {"rope_theta", "rope_scaling"}


def test_default_rope_gets_no_scaling() -> None:
    """Only the theta is repeated."""
    spelled = checkpoint.both_spellings({"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}})
    assert spelled["rope_theta"] == 1e4
    assert "rope_scaling" not in spelled


@pytest.mark.parametrize(
    ("shape", "model_shape", "expected"),
    [
        ((2, 3), (2, 3), []),
        ((2,), (3,), [("its shape is [2]", "shape [3]")]),
        (None, (3,), [("the tensor is missing", "shape [3]")]),
        ((2,), None, [("isn't a tensor of Llama", None)]),
    ],
)
def test_a_tensor_is_compared_by_presence_and_shape(shape: object, model_shape: object, expected: list) -> None:
    """Each difference says what should have been there."""
    assert checkpoint._differences(shape, model_shape, "Llama") == expected


def test_the_tokenizers_settings_are_readable_by_transformers_4(tmp_path: Path) -> None:
    """The class and the special tokens get their older names, and the template leaves for its own file."""
    settings = {
        "tokenizer_class": "TokenizersBackend",
        "extra_special_tokens": ["<x>"],
        "chat_template": "{{ x }}",
        "eos_token": "<e>",
    }
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(settings))
    checkpoint._write_tokenizer_config(tmp_path)
    assert json.loads(file.read_text()) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": ["<x>"],
        "eos_token": "<e>",
    }


def test_settings_that_need_no_change_stay_byte_for_byte(tmp_path: Path) -> None:
    """The file's own spacing survives, so that the folder's digest doesn't change."""
    file = tmp_path / "tokenizer_config.json"
    file.write_bytes(b'{"eos_token":   "<e>"}\r\n')
    checkpoint._write_tokenizer_config(tmp_path)
    assert file.read_bytes() == b'{"eos_token":   "<e>"}\r\n'


def test_templates_get_a_file_each_and_none_outside_the_folder(tmp_path: Path) -> None:
    """The default one has its own place, named ones lie beside it, and a name can't lead out of the folder."""
    source, folder = model_folder.make(tmp_path / "source"), tmp_path / "made"
    folder.mkdir()
    (source / "chat_template.jinja").unlink()
    names = ("default", "rag", "../../outside")
    templates = [{"name": name, "template": f"{{{{ {number} }}}}"} for number, name in enumerate(names)]
    (source / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
    checkpoint._write_template(source, folder)
    assert (folder / "chat_template.jinja").read_text() == "{{ 0 }}"
    assert (folder / "additional_chat_templates" / "rag.jinja").read_text() == "{{ 1 }}"
    assert not list(tmp_path.glob("outside*"))
