"""A Hugging Face folder into the form that later stages take: bf16 safetensors, both config spellings.

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
# Buffers that old checkpoints carry and no model reads any more.
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
    """The configuration so that transformers 4 and 5 read the same from it.

    transformers 4 takes rope_theta and rope_scaling from the top level and would fall back to a theta of
    10000 in silence where only rope_parameters, the form of 5, is there.
    """
    found = {**config, "dtype": "bfloat16", "torch_dtype": "bfloat16"}
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        found["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            found["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    return found


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
    except Exception as error:  # a wrong value fails in as many ways as there are models
        raise ModelError(
            f"transformers can't build the model: {error}",
            file=str(folder / "config.json"),
            remedy="fetch the file again",
        ) from error


def check_tensors(folder: Path, shapes: Mapping[str, tuple[int, ...]], file: Path) -> None:
    """Compare tensors by name with what config.json in `folder` asks for; `file` is where they lie.

    Raises ModelError naming every tensor that is missing, unknown or of another shape.
    """
    model = skeleton(folder)
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    problems = [
        Problem(what, file=str(file), key=name, allowed=allowed, remedy="fetch it again, or another revision")
        for name in weights.in_order(dict.fromkeys([*wanted, *shapes], ()))
        for what, allowed in _differences(shapes.get(name), wanted.get(name), type(model).__name__)
    ]
    if problems:
        raise ModelError(problems)


def _check_same_head(source: Path, file: Path) -> None:
    """A tied head that is stored again must be the embedding: libraries differ in which one they take."""
    with weights.Reader(source) as tensor:
        if not bool((tensor(HEAD) == tensor(EMBEDDING)).all()):
            raise ModelError(
                "differs from the embedding, and config.json says that they are one",
                file=str(file),
                key=HEAD,
                remedy="set tie_word_embeddings to false in config.json, if the head was trained",
            )


def _differences(
    found: tuple[int, ...] | None, wanted: tuple[int, ...] | None, architecture: str
) -> list[tuple[str, str | None]]:
    if found is None:
        return [("the tensor is missing", f"shape {list(wanted or ())}")]
    if wanted is None:
        return [(f"{architecture} has no such tensor", None)]
    return [] if found == wanted else [(f"its shape is {list(found)}", f"shape {list(wanted)}")]


def _write_template(source: Path, folder: Path) -> None:
    """One file for the template, so that no second one contradicts it; named further ones beside it."""
    for name, template in checks.template_of(source).items():
        path = (
            folder / "chat_template.jinja" if name == "default" else folder / f"additional_chat_templates/{name}.jinja"
        )
        if path.resolve().is_relative_to(folder.resolve()):
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(template.encode())


def _write_tokenizer_config(folder: Path) -> None:
    """Spell it so that transformers 4 reads it as well, and leave the template to its own file."""
    path = folder / "tokenizer_config.json"
    config = checks.read_object(path) or {}
    wanted = {key: value for key, value in config.items() if key != "chat_template"}
    if wanted.get("tokenizer_class") == "TokenizersBackend":
        wanted["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(wanted.get("extra_special_tokens"), list):
        wanted["additional_special_tokens"] = wanted.pop("extra_special_tokens")
    if wanted != config:
        write_json(path, wanted)
