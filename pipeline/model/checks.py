"""Every reason to refuse a model folder, reported before anything is loaded.

Standard library only. Covers code (.py, auto_map, kernels named in a config), pickle, links that leave the folder,
broken headers, and missing parts. Numbers that aren't finite are noticed later, during the copy.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import ModelError, Problem
from pipeline.model import weights

PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz"}
CODE = {".py", ".pyc", ".pyo", ".pyd", ".so"}
# Keys of a JSON file that make a library import code from the folder or from elsewhere.
CODE_KEYS = {"auto_map", "custom_pipelines"}
KERNEL_KEYS = {
    "attn_implementation",
    "_attn_implementation",
    "experts_implementation",
    "_experts_implementation",
}
# Dense decoders that peft, llm-compressor's AWQ mappings and vLLM all know.
ARCHITECTURES = (
    "Gemma2ForCausalLM", "Gemma3ForCausalLM", "GraniteForCausalLM", "LlamaForCausalLM", "MistralForCausalLM",
    "Phi3ForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "SmolLM3ForCausalLM",
)  # fmt: skip
FULL_PRECISION = {"BF16", "F16", "F32", "F64"}
TOKENIZERS = ("tokenizer.json", "tokenizer.model")
NO_WEIGHTS = "the weights are missing"
CODE_REMEDY = "choose a model that transformers loads without code of the model's own"
SAFE_REMEDY = "convert the weights to safetensors where you trust them, then delete this file"


def problems(folder: Path, links_within: Path | None = None) -> list[Problem]:
    """Every reason not to load the model in `folder`, whether full precision or quantized.

    Links may point into `links_within` (a download cache that keeps its files elsewhere), else only into
    the folder.
    """
    if not folder.is_dir():
        return [Problem("isn't a folder", file=str(folder), remedy="name the folder that holds config.json")]
    inside = (folder.resolve(), *([links_within.resolve()] if links_within else []))
    file_problems = [problem for path in _walk(folder) for problem in _of_file(path, inside)]
    return file_problems + list(_missing_parts(folder))


def base_problems(folder: Path) -> list[Problem]:
    """Reasons not to train on the model in `folder`: an unknown architecture, quantized weights."""
    config_file = folder / "config.json"
    config = read_object(config_file)
    if config is None:
        return []  # `problems` reports that
    reasons = []
    architecture = architecture_of(config)
    if architecture not in ARCHITECTURES:
        reasons.append(
            Problem(
                f"architecture {architecture} isn't supported",
                file=str(config_file), key="architectures", allowed=", ".join(ARCHITECTURES),
                remedy="set base_model to a model of one of these architectures",
            )
        )  # fmt: skip
    has_config = config.get("quantization_config") is not None
    try:
        dtypes = {tensor.dtype for tensor in weights.tensors(folder).values()}
    except ModelError:
        dtypes = set()
    if has_config or not dtypes <= FULL_PRECISION:
        evidence = "quantization_config" if has_config else ", ".join(sorted(dtypes - FULL_PRECISION))
        reasons.append(
            Problem(
                f"the weights are already quantized ({evidence})",
                file=str(config_file), allowed="weights in " + ", ".join(sorted(FULL_PRECISION)),
                remedy="set base_model to the model it was quantized from",
            )
        )  # fmt: skip
    return reasons


def architecture_of(config: dict[str, Any]) -> str | None:
    """The first class in config.json's `architectures`; None without any."""
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else None


def read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None when the file is missing or holds something else."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def template_of(folder: Path) -> dict[str, str]:
    """The chat templates of the folder by name, the one to use under "default"; empty for a folder without any.

    Newer models keep it in chat_template.jinja, others in tokenizer_config.json (one, or a list with names)
    or chat_template.json.
    """
    if (folder / "chat_template.jinja").is_file():
        return {"default": (folder / "chat_template.jinja").read_bytes().decode("utf-8", "replace")}
    for name in ("tokenizer_config.json", "chat_template.json"):
        template = (read_object(folder / name) or {}).get("chat_template")
        if isinstance(template, str) and template.strip():
            return {"default": template}
        if isinstance(template, list):
            entries = [entry for entry in template if isinstance(entry, dict) and {"name", "template"} <= entry.keys()]
            return {str(entry["name"]): str(entry["template"]) for entry in entries}
    return {}


def _walk(folder: Path) -> Iterator[Path]:
    """All files and links below the folder, sorted, without following links to folders."""
    for root, folders, names in os.walk(folder):
        folders.sort()
        yield from (Path(root, name) for name in folders if Path(root, name).is_symlink())
        yield from (Path(root, name) for name in sorted(names))


def _of_file(path: Path, inside: tuple[Path, ...]) -> Iterator[Problem]:
    file, suffix = str(path), path.suffix.lower()
    target = Path(os.path.realpath(path))
    if path.is_symlink() and not any(target.is_relative_to(place) for place in inside):
        yield Problem(
            f"is a link that leaves the folder, to {target}",
            file=file,
            allowed="links within the folder",
            remedy="copy the model with `cp -rL`, or name it by hub id and revision",
        )
    elif suffix in PICKLES:
        danger = "may hold pickle, which runs code when it is loaded"
        yield Problem(danger, file=file, allowed="safetensors weights", remedy=SAFE_REMEDY)
    elif suffix in CODE:
        danger = "is code; a model must not bring any"
        yield Problem(danger, file=file, allowed="safetensors, JSON and text", remedy=CODE_REMEDY)
    elif path.is_dir():
        pass  # a link to a folder within
    elif not path.is_file():
        yield Problem("isn't a readable file", file=file, remedy="fetch it again")
    elif suffix == ".json":
        yield from _of_json(path)
    elif suffix == ".safetensors":
        try:
            weights.read_header(path)
        except weights.BadHeader as error:
            yield Problem(str(error), file=file, remedy="fetch the file again")


def _of_json(path: Path) -> Iterator[Problem]:
    """Keys at any depth that bring code in; noted during parsing, so that an escape or a second key can't hide one."""
    keys: dict[str, str] = {}

    def note(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        for key, value in pairs:
            # In a vocabulary such a word is a token with a number.
            if (key in CODE_KEYS and not isinstance(value, int)) or (key in KERNEL_KEYS and _names_kernel(value)):
                keys.setdefault(key, str(value))
        return dict(pairs)

    try:
        text = path.read_text(encoding="utf-8")
        json.loads(text, object_pairs_hook=note)
    except json.JSONDecodeError as error:
        yield Problem(f"isn't JSON: {error.msg}", file=str(path), line=error.lineno, remedy="fetch the file again")
        return
    except (UnicodeDecodeError, RecursionError) as error:
        yield Problem(f"isn't JSON: {error}", file=str(path), remedy="fetch the file again")
        return
    for key, value in sorted(keys.items()):
        line = next((number for number, row in enumerate(text.splitlines(), 1) if f'"{key}"' in row), None)
        yield Problem(
            f"names code to run: {value[:100]}", file=str(path), line=line, key=key, allowed=f"no {key}",
            remedy=CODE_REMEDY,
        )  # fmt: skip


def _names_kernel(value: Any) -> bool:
    values = value.values() if isinstance(value, dict) else [value]
    return any(isinstance(entry, str) and "/" in entry for entry in values)


def _missing_parts(folder: Path) -> Iterator[Problem]:
    config = folder / "config.json"
    if (folder / "adapter_config.json").is_file():
        yield Problem("is an adapter, not a complete model", file=str(folder / "adapter_config.json"),
                      remedy="merge it into its base first, and name the merged folder")  # fmt: skip
    if not config.is_file():
        yield Problem("is missing", file=str(config), remedy="name the folder that holds config.json")
    elif read_object(config) is None and _is_json(config):
        yield Problem("isn't a JSON object", file=str(config), remedy="fetch the file again")
    try:
        if not weights.files(folder):
            yield Problem(
                NO_WEIGHTS,
                file=str(folder),
                allowed=f"{weights.SINGLE}, or shards with {weights.INDEX}",
                remedy="fetch the safetensors files of the model",
            )
    except ModelError as error:
        yield from error.problems
    if not any((folder / name).is_file() for name in TOKENIZERS):
        yield Problem("the tokenizer is missing", file=str(folder), allowed=" or ".join(TOKENIZERS),
                      remedy="copy the tokenizer's files from where the model came")  # fmt: skip
    if "default" not in template_of(folder):
        yield Problem(
            "the chat template is missing", file=str(folder),
            allowed="chat_template.jinja, or chat_template in tokenizer_config.json",
            remedy="take the -Instruct version of the model, or add the template you will serve it with",
        )  # fmt: skip


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return False
    return True
