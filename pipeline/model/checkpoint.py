"""Rewrites a Hugging Face folder in the form that later stages read: bf16 safetensors, both config spellings.

Weights are copied tensor by tensor, whatever their size. Runs in the train environment.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import ModelError, Problem
from pipeline.files import write_json
from pipeline.model import checks, licence, weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
)
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
# Buffers in old checkpoints; current models don't read them.
LEFT_OUT = ("rotary_emb.inv_freq", "attn.masked_bias")


def copy(source: Path, folder: Path, on_progress: Callable[[int, int], None]) -> None:
    """Copy the checked model in `source` to `folder`.

    Raises ModelError for tensors that are missing, unknown, of a wrong shape or not finite; ResourceError
    for the disk.
    """
    config = checks.read_object(source / "config.json") or {}
    shapes = {name: tensor.shape for name, tensor in weights.tensors(source).items() if not name.endswith(LEFT_OUT)}
    file = source / weights.SINGLE if (source / weights.SINGLE).is_file() else source / weights.INDEX
    if shapes.get(HEAD) and skeleton(source).config.tie_word_embeddings:
        _check_same_head(source, file)
        del shapes[HEAD]
    check_tensors(source, shapes, file)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    _write_template(source, folder)
    _write_tokenizer_config(folder)
    licence.copy(source, folder)
    write_json(folder / "config.json", both_spellings(config))
    with weights.Reader(source) as tensor:
        weights.write(folder, shapes, tensor, on_progress)


def both_spellings(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration in a spelling that transformers 4 and 5 read alike.

    transformers 4 takes rope_theta and rope_scaling from the top level. From rope_parameters alone, the form of 5,
    it would silently use a theta of 10000.
    """
    spelling = {**config, "dtype": "bfloat16", "torch_dtype": "bfloat16"}
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        spelling["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            spelling["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    return spelling


def skeleton(folder: Path) -> PreTrainedModel:
    """The model's modules without weights: names and shapes only.

    Raises ModelError when transformers can't build it from config.json.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # each model class fails on a wrong value in its own way
        raise ModelError(
            f"transformers can't build the model: {error}",
            file=str(folder / "config.json"),
            remedy="fetch the file again",
        ) from error


def check_tensors(folder: Path, shapes: Mapping[str, tuple[int, ...]], file: Path) -> None:
    """Compare tensors by name with the model that config.json in `folder` describes; `file` holds the tensors.

    Raises ModelError naming every tensor that is missing, unknown or of another shape.
    """
    model = skeleton(folder)
    parameters = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    problems = [
        Problem(mistake, file=str(file), key=name, allowed=right, remedy="fetch it again, or another revision")
        for name in weights.in_order(dict.fromkeys([*parameters, *shapes], ()))
        for mistake, right in _differences(shapes.get(name), parameters.get(name), type(model).__name__)
    ]
    if problems:
        raise ModelError(problems)


def _check_same_head(source: Path, file: Path) -> None:
    """Raise ModelError unless a tied head that is stored again equals the embedding: libraries read either one."""
    with weights.Reader(source) as tensor:
        if not bool((tensor(HEAD) == tensor(EMBEDDING)).all()):
            raise ModelError(
                "differs from the embedding, but config.json ties the two",
                file=str(file),
                key=HEAD,
                remedy="if the head was trained, set tie_word_embeddings to false in config.json, else fetch the weights again",
            )


def _differences(
    shape: tuple[int, ...] | None, model_shape: tuple[int, ...] | None, architecture: str
) -> list[tuple[str, str | None]]:
    if shape is None:
        return [("the tensor is missing", f"shape {list(model_shape or ())}")]
    if model_shape is None:
        return [(f"isn't a tensor of {architecture}", None)]
    return [] if shape == model_shape else [(f"its shape is {list(shape)}", f"shape {list(model_shape)}")]


def _write_template(source: Path, folder: Path) -> None:
    """Write the default template into one file, so that nothing contradicts it, and the named ones beside it."""
    for name, template in checks.template_of(source).items():
        path = (
            folder / "chat_template.jinja" if name == "default" else folder / f"additional_chat_templates/{name}.jinja"
        )
        if path.resolve().is_relative_to(folder.resolve()):
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(template.encode())


def _write_tokenizer_config(folder: Path) -> None:
    """Rewrite it in the spelling that transformers 4 reads, too, and without the template, which has its own file."""
    path = folder / "tokenizer_config.json"
    config = checks.read_object(path) or {}
    settings = {key: value for key, value in config.items() if key != "chat_template"}
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    if settings != config:
        write_json(path, settings)
