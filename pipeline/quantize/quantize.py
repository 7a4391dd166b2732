"""Stage program: a merged model → the same model in fewer bits a weight, checked against its original.

    python -m pipeline.quantize.quantize REQUEST.json

The table METHODS names the environment that it runs in and the module that quantizes. Calibrates on the calibration set
as the chat template renders it, answers included. The payload is the input's folder with other weights and a
quantization_config; tokenizer, template and all other files are the input's bytes. For dense decoders, the only ones that
the base stage lets through. lm_head and embeddings stay unchanged.
"""

from __future__ import annotations

import gc
import importlib
import json
import re
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from pipeline import files, out_of_memory, program
from pipeline.artifacts import Artifact
from pipeline.config import methods
from pipeline.config.schema import QuantizeConfig
from pipeline.digests import digest_file
from pipeline.errors import ConfigError, ModelError, Problem, StageFailed
from pipeline.model import special_tokens, weights
from pipeline.quantize import check
from pipeline.quantize.calibration import encode, load_tokenizer, read_rows, take

GROUP_SIZES = (128, 64, 32)
PACKED = 8
"""Weights of 4 bits in an int32: both formats want output sizes that are a multiple."""
WITHOUT = "set quantize.method: none to serve the merged model"
LINEAR = re.compile(r"\.\d+\..*\.weight$")


def run(request: program.Request) -> dict[str, Any]:
    """Quantize the merged (or base) model of the request; the detail says how, and how near it is to the original.

    Raises ConfigError for a group size that doesn't fit, ModelError for a model that can't be quantized, DataError for an
    unusable calibration set. Raises StageFailed when the quantizer left data out or its folder is broken, and
    ResourceError when memory doesn't suffice.
    """
    import torch

    settings = QuantizeConfig(**request.config["quantize"])
    method = _method(settings)
    source = Artifact(**(request.inputs.get("merge") or request.inputs["base"])).payload
    shapes = linear_shapes(source)
    group_size = choose_group_size(settings.group_size, shapes)
    tokenizer = load_tokenizer(source)
    rows = read_rows(Artifact(**request.inputs["prepare"]).payload / "calibration.jsonl")
    samples = encode(rows, tokenizer, special_tokens.end_tokens(source, tokenizer))
    calibration = take(samples, settings.num_calibration_samples, settings.max_calibration_tokens)
    program.message(f"{method.label}: calibrating on {calibration}, groups of {group_size}")

    backend = importlib.import_module(method.program)
    effort = backend.EFFORT["cuda" if torch.cuda.is_available() else "cpu"]
    grid: dict[str, Any] = {name: getattr(settings, name) for name in method.settings}
    scratch, output = request.folder / "scratch", _emptied(request.folder / "scratch" / "made")
    with _out_of_memory_named("quantizing", settings):
        model = backend.load(source, scratch)
        original = check.read(model, calibration.probe)
        quantization = backend.quantize(
            model, tokenizer, [sample.ids for sample in calibration.samples], group_size=group_size, **grid,
            folder=output, on_layer=lambda number, layers: program.progress(number, layers, "layers"), **effort,
        )  # fmt: skip
    del model
    _free()
    assemble(source, output, quantization, _emptied(request.payload))
    with _out_of_memory_named("checking the quantized model", settings):
        comparison = check.compare(backend.load(source, scratch), request.payload, calibration.probe, original)
    program.message(
        f"perplexity of {len(calibration.probe)} answers: {original.perplexity:.2f} → {comparison.perplexity:.2f}"
    )
    return {
        "method": settings.method,
        "backend": settings.backend,
        "label": method.label,
        "format": quantization["quant_method"],
        "group_size": group_size,
        **grid,
        "linear_layers": len(shapes),
        "samples": len(calibration.samples),
        "tokens": calibration.tokens,
        "trimmed": calibration.cut_short,
        "effort": effort,
        "perplexity_before": original.perplexity,
        "perplexity_after": comparison.perplexity,
        "layer_errors": [round(error, 4) for error in comparison.layer_errors],
    }


def _method(settings: QuantizeConfig) -> methods.Method:
    """The table's record. Raises ConfigError for method none, which needs no stage."""
    method = methods.of(settings.model_dump(include={"method", "backend"}))
    if method is None:
        raise ConfigError(
            "quantize.method: none must not reach this stage",
            key="quantize.method",
            allowed=", ".join(name for name in methods.names() if name != methods.NONE),
            remedy="run `tunegate run CONFIG`, which leaves the stage out",
        )
    return method


def linear_shapes(folder: Path) -> dict[str, tuple[int, int]]:
    """(output, input) size of every linear layer to be quantized, by its weight's name, from headers alone.

    Raises ModelError without any, or naming every layer whose output size can't be packed.
    """
    shapes = {
        tensor.name: (tensor.shape[0], tensor.shape[1])
        for tensor in weights.tensors(folder).values()
        if len(tensor.shape) == 2 and LINEAR.search(tensor.name)
    }
    defects = [
        f"output size {rows} of {name} is not a multiple of {PACKED}"
        for name, (rows, _) in shapes.items()
        if rows % PACKED
    ]
    defects += [] if shapes else ["linear layers are not in numbered decoder layers"]
    if defects:
        remedy = f"{WITHOUT}, or set another base_model"
        raise ModelError([Problem(defect, file=str(folder), remedy=remedy) for defect in defects])
    return shapes


def choose_group_size(setting: int | str, shapes: Mapping[str, tuple[int, int]]) -> int:
    """The group size of the setting; for "auto" the largest of 128, 64 and 32 that divides every input size.

    Raises ConfigError naming a layer that doesn't fit, and the sizes that do.
    """
    fitting = [size for size in GROUP_SIZES if all(columns % size == 0 for _, columns in shapes.values())]
    if setting in fitting:
        return int(setting)
    if setting == "auto" and fitting:
        return fitting[0]
    size = GROUP_SIZES[-1] if setting == "auto" else int(setting)
    misfits = [f"{name} ({columns})" for name, (_, columns) in shapes.items() if columns % size]
    more = f" and {len(misfits) - 1} more" if len(misfits) > 1 else ""
    raise ConfigError(
        f"groups of {size} weights don't divide the input size of {misfits[0]}{more}",
        key="quantize.group_size",
        allowed=", ".join(map(str, fitting)) or f"none of {', '.join(map(str, GROUP_SIZES))} fits this model",
        remedy="set quantize.group_size: auto" if fitting else WITHOUT,
    )


def assemble(source: Path, output: Path, quantization: Mapping[str, Any], payload: Path) -> None:
    """Fill the payload: the input's files byte for byte, the output's weights, config.json with a quantization_config.

    Raises StageFailed when a copied file isn't the input's.
    """
    heavy = {path.name for path in weights.files(source)} | {weights.INDEX, "config.json"}
    for path in sorted(source.iterdir()):
        if path.is_file() and path.name not in heavy:
            shutil.copyfile(path, payload / path.name)
            if digest_file(path) != digest_file(payload / path.name):
                raise StageFailed(
                    "a copy differs from its original", file=str(path), remedy="check the disk, run again"
                )
    for path in [*weights.files(output), *output.glob(weights.INDEX)]:
        shutil.move(path, payload / path.name)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    public = {key: setting for key, setting in config.items() if not key.startswith("_")}
    files.write_json(payload / "config.json", {**public, "quantization_config": dict(quantization)})


def _out_of_memory_named(step: str, settings: QuantizeConfig) -> AbstractContextManager[None]:
    """A ResourceError that says how to calibrate with fewer tokens in all, or at once."""
    tokens, samples = settings.max_calibration_tokens, settings.num_calibration_samples
    remedy = (
        f"set quantize.max_calibration_tokens: {max(1, tokens // 2)} or quantize.num_calibration_samples: "
        f"{max(1, samples // 2)}, or end other programs that use the memory or the GPU"
    )
    return out_of_memory.named(step, "quantize.max_calibration_tokens", remedy)


def _free() -> None:
    """Give back a model's memory on the GPU: hooks make reference cycles, which only the collector breaks."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _emptied(folder: Path) -> Path:
    """The folder, emptied of a killed run's files."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


if __name__ == "__main__":
    program.main(run)
