from __future__ import annotations

import json
import os

import pytest
from support import model_folder

from pipeline.model import checks


def test_nothing_speaks_against_a_plain_folder(tmp_path):
    """A folder of safetensors, JSON and text passes, also with a token that is called auto_map."""
    folder = model_folder.make(tmp_path / "m")
    assert checks.problems(folder) == []
    assert checks.base_problems(folder) == []


def test_all_that_is_unsafe_or_missing_is_told_at_once(tmp_path):
    """One look names each pickle, each code file, auto_map, the leaving link and what isn't there."""
    folder = model_folder.make(tmp_path / "m", auto_map={"AutoModel": "evil.Model"})
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    (folder / "sub").mkdir()
    (folder / "sub" / "OPTIMIZER.PT").write_bytes(b"")
    (folder / "evil.py").write_text("print('evil')")
    (tmp_path / "outside.txt").write_text("secret")
    (folder / "notes.txt").symlink_to("../outside.txt")
    (folder / "tokenizer.json").unlink()
    (folder / "chat_template.jinja").unlink()
    (folder / "model.safetensors").write_bytes(b"PK\x03\x04 is a zip")
    found = {(os.path.relpath(problem.file, folder), problem.what.split(",")[0]) for problem in checks.problems(folder)}
    assert found == {
        ("config.json", "names code to run: {'AutoModel': 'evil.Model'}"),
        ("evil.py", "is code; a model must not bring any"),
        ("model.safetensors", "isn't a safetensors file"),
        ("notes.txt", "is a link that leaves the folder"),
        ("pytorch_model.bin", "may hold pickle"),
        ("sub/OPTIMIZER.PT", "may hold pickle"),
        (".", "the tokenizer is missing"),
        (".", "the chat template is missing"),
    }
    assert all(problem.remedy for problem in checks.problems(folder))


@pytest.mark.parametrize(
    ("name", "text", "key", "line"),
    [
        ("tokenizer_config.json", '{\n "auto_map": {"AutoTokenizer": ["a.B", null]}\n}', "auto_map", 2),
        (
            "config.json",
            '{"architectures": ["X"], "text_config": {"auto_map": {"AutoModel": "a.B"}}}',
            "auto_map",
            1,
        ),
        ("config.json", '{"\\u0061uto_map": {"AutoModel": "a.B"}}', "auto_map", None),
        ("config.json", '{"auto_map": {"AutoModel": "a.B"}, "auto_map": null}', "auto_map", 1),
        ("config.json", '{"custom_pipelines": {"p": {"impl": "a.B"}}}', "custom_pipelines", 1),
        ("config.json", '{\n"attn_implementation": "someone/kernel"}', "attn_implementation", 2),
    ],
)
def test_no_spelling_of_auto_map_slips_through(tmp_path, name, text, key, line):
    """Keys that bring code in are found nested, escaped and doubled, with their line."""
    folder = model_folder.make(tmp_path / "m")
    (folder / name).write_text(text)
    found = [problem for problem in checks.problems(folder) if problem.key == key]
    assert [(problem.file, problem.line) for problem in found] == [(str(folder / name), line)]


def test_a_link_within_the_folder_or_into_a_named_cache_is_fine(tmp_path):
    """The hub's cache keeps files elsewhere and links to them: allowed where the caller names the place."""
    folder = model_folder.make(tmp_path / "cache" / "snapshots" / "m")
    blob = tmp_path / "cache" / "blobs" / "abc"
    blob.parent.mkdir()
    (folder / "config.json").rename(blob)
    (folder / "config.json").symlink_to("../../blobs/abc")
    (folder / "again.md").symlink_to("README.md")
    assert [problem.file for problem in checks.problems(folder)] == [str(folder / "config.json")]
    assert checks.problems(folder, tmp_path / "cache") == []


def test_a_link_that_leads_nowhere_or_to_itself_is_told(tmp_path):
    """Broken links are problems, not crashes."""
    folder = model_folder.make(tmp_path / "m")
    (folder / "loop.txt").symlink_to("loop.txt")
    (folder / "gone.txt").symlink_to("nothing.txt")
    assert [problem.what for problem in checks.problems(folder)] == ["isn't a readable file"] * 2


def test_broken_json_is_told_with_its_line(tmp_path):
    """A JSON file that doesn't parse names its line."""
    folder = model_folder.make(tmp_path / "m")
    (folder / "tokenizer_config.json").write_text('{\n "eos_token": <|im_end|>\n}')
    found = checks.problems(folder)
    assert [(problem.file, problem.line) for problem in found] == [(str(folder / "tokenizer_config.json"), 2)]


def test_an_adapter_is_no_base(tmp_path):
    """A folder with adapter_config.json would make a library fetch another base by name."""
    folder = model_folder.make(tmp_path / "m")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/else"}')
    assert [problem.what for problem in checks.problems(folder)] == ["is an adapter, not a complete model"]


@pytest.mark.parametrize("name", ["tokenizer_config.json", "chat_template.json"])
@pytest.mark.parametrize(
    "value", ["{{ x }}", [{"name": "default", "template": "{{ x }}"}, {"name": "rag", "template": "r"}]]
)
def test_the_template_is_found_wherever_models_keep_it(tmp_path, name, value):
    """Its own file, tokenizer_config.json with one or several, or chat_template.json."""
    folder = model_folder.make(tmp_path / "m")
    (folder / "chat_template.jinja").unlink()
    (folder / name).write_text(json.dumps({"chat_template": value}))
    assert checks.template_of(folder)["default"] == "{{ x }}"
    assert checks.problems(folder) == []


def test_an_unknown_architecture_and_quantized_weights_are_no_base_but_may_be_served(tmp_path):
    """Training refuses them both at once; a quantized folder still passes the check before serving."""
    folder = model_folder.make(tmp_path / "m", architectures=["MambaForCausalLM"])
    model_folder.safetensors(folder / "model.safetensors", {"w.qweight": ("I32", [4, 2]), "n": ("BF16", [2])})
    assert [problem.what for problem in checks.base_problems(folder)] == [
        "architecture MambaForCausalLM isn't supported",
        "the weights are already quantized (I32)",
    ]
    assert checks.problems(folder) == []
