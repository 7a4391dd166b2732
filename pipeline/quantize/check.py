"""Whether a quantized folder is what it should be: read from its bytes, unpacked, compared with the original.

Both formats are unpacked here without the packages that packed them: `pack-quantized` of compressed-tensors
and AutoAWQ's GEMM. AWQ rescales weights between layers, so weights aren't compared one by one; each decoder
layer's output on the original's own input is, and the perplexity of the whole. Knows 4-bit weights in groups,
and decoders whose layers are a list.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import ModelError, Problem, StageFailed
from pipeline.model import weights
from pipeline.quantize.calibration import Sample

if TYPE_CHECKING:
    import torch

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""AutoAWQ's nibble i of an int32 holds output column AWQ_ORDER[i] of its eight."""
SCALES = {"weight_packed": "weight_scale", "qweight": "scales"}
PARTS = {"weight_scale", "weight_shape", "weight_zero_point", "scales", "qzeros"}
MAX_LAYER_ERROR = 0.6
MAX_PERPLEXITY_RATIO = 3.0


@dataclass(frozen=True)
class Reading:
    """What a model did with the probe samples.

    `perplexity` is that of their answers; `layers` holds what each decoder layer did with each sample, on the
    CPU.
    """

    perplexity: float
    layers: tuple[tuple[LayerCall, ...], ...]


@dataclass(frozen=True)
class LayerCall:
    """One call of a decoder layer: `entered` and `added` have shape (tokens, hidden)."""

    entered: torch.Tensor
    added: torch.Tensor


@dataclass(frozen=True)
class Comparison:
    """The quantized model on the same samples: perplexity, and each layer's error as in `layer_errors`."""

    perplexity: float
    layer_errors: tuple[float, ...]


def read(model: Any, samples: Sequence[Sample]) -> Reading:
    """Run the original model on token-id samples (on a GPU if it fits) and keep what its layers did."""
    layers = decoder_layers(model)
    calls: list[list[LayerCall]] = [[] for _ in layers]

    def keep(index: int) -> Callable[..., None]:
        def hook(_layer: Any, args: tuple[Any, ...], output: Any) -> None:
            entered = args[0][0]
            calls[index].append(LayerCall(entered.cpu(), (_hidden(output)[0] - entered).cpu()))

        return hook

    handles = [layer.register_forward_hook(keep(index)) for index, layer in enumerate(layers)]
    with _on_accelerator(model), _removing(handles):
        value = perplexity(model, samples)
    return Reading(value, tuple(tuple(call) for call in calls))


def compare(model: Any, folder: Path, samples: Sequence[Sample], original: Reading) -> Comparison:
    """Give a plain model the quantized folder's weights and compare it with what the original did.

    Raises ModelError for broken tensors, and StageFailed when a layer or the whole answers otherwise than
    rounding explains.
    """
    with _on_accelerator(model):
        load_dequantized(model, folder)
        found = Comparison(perplexity(model, samples), tuple(layer_errors(model, samples, original)))
    problems = [
        Problem(
            f"layer {index} adds something else than the original's: error {error:.2f} of its size",
            allowed=f"up to {MAX_LAYER_ERROR}",
        )
        for index, error in enumerate(found.layer_errors)
        if not error <= MAX_LAYER_ERROR
    ]
    if not found.perplexity <= MAX_PERPLEXITY_RATIO * original.perplexity:
        problems.append(
            Problem(
                f"perplexity of the answers went from {original.perplexity:.2f} to {found.perplexity:.2f}",
                allowed=f"up to {MAX_PERPLEXITY_RATIO:g} times as much",
            )
        )
    if problems:
        remedy = "try the other quantize.method (AutoAWQ is known to do this on a CPU), and report it"
        raise StageFailed(
            [
                Problem("the quantizer corrupted the weights", file=str(folder), remedy=remedy),
                *problems,
            ]
        )
    return found


def layer_errors(model: Any, samples: Sequence[Sample], original: Reading) -> list[float]:
    """For each decoder layer of the quantized model, the median over tokens of |added' - added| / |added|.

    Every layer is fed the original's input, so that one layer's error isn't charged to the next.
    """
    import torch

    layers = decoder_layers(model)
    errors: list[list[torch.Tensor]] = [[] for _ in layers]

    def swap(index: int) -> Callable[..., Any]:
        def hook(_layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            call = original.layers[index][len(errors[index])]
            return (call.entered.unsqueeze(0).to(args[0]), *args[1:]), kwargs

        return hook

    def compare(index: int) -> Callable[..., None]:
        def hook(_layer: Any, _args: tuple[Any, ...], output: Any) -> None:
            call = original.layers[index][len(errors[index])]
            added = _hidden(output)[0].cpu().float() - call.entered.float()
            wrong = (added - call.added.float()).norm(dim=-1)
            errors[index].append(wrong / call.added.float().norm(dim=-1).clamp(min=1e-6))

        return hook

    handles = [layer.register_forward_pre_hook(swap(index), with_kwargs=True) for index, layer in enumerate(layers)]
    handles += [layer.register_forward_hook(compare(index)) for index, layer in enumerate(layers)]
    with _removing(handles):
        perplexity(model, samples)
    return [float(torch.cat(layer).median()) for layer in errors]


def perplexity(model: Any, samples: Sequence[Sample]) -> float:
    """Of the samples' answers, given what comes before them; inf where it overflows or isn't a number."""
    import torch

    total, count = 0.0, 0
    with torch.no_grad():
        for sample in samples:
            ids = torch.tensor([sample.ids], device=model.device)
            right = ids[0, sample.judged]
            logits = model(input_ids=ids, use_cache=False).logits[0, sample.answer - 1 :][: len(right)].float()
            total += float(torch.nn.functional.cross_entropy(logits, right, reduction="sum"))
            count += len(right)
    mean = total / max(count, 1)
    return math.exp(mean) if mean < 700 else math.inf


def decoder_layers(model: Any) -> list[Any]:
    """The decoder's layers, in order."""
    return list(model.get_decoder().layers)


@contextmanager
def _on_accelerator(model: Any) -> Iterator[None]:
    """Hold the model on the GPU, where there is one with room for it, and leave it where it was."""
    import torch

    size = sum(parameter.nbytes for parameter in model.parameters())
    there = model.device.type == "cuda" or not torch.cuda.is_available()
    if there or size > 0.8 * torch.cuda.mem_get_info()[0]:
        yield
        return
    model.to("cuda")
    try:
        yield
    finally:
        model.to("cpu")
        torch.cuda.empty_cache()


@contextmanager
def _removing(handles: Sequence[Any]) -> Iterator[None]:
    """Remove hooks at the end, whatever happens."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hidden(output: Any) -> Any:
    """A decoder layer returns its hidden states, alone or first (transformers 4)."""
    return output[0] if isinstance(output, tuple) else output


def load_dequantized(model: Any, folder: Path) -> None:
    """Overwrite a plain model's weights with what the quantized folder's bytes mean, unpacked where the model lies.

    Raises ModelError when a tensor is missing, unknown, of another shape, or broken.
    """
    import torch

    wanted = dict(model.named_parameters())
    problems, seen = [], set()
    with torch.no_grad():
        for name, tensor in dequantized(folder, model.device):
            parameter = wanted.get(name)
            if parameter is None or parameter.shape != tensor.shape:
                shape = "unknown to the model" if parameter is None else f"of shape {tuple(parameter.shape)} there"
                problems.append(Problem(f"{name} of shape {tuple(tensor.shape)} is {shape}", file=str(folder)))
                continue
            seen.add(name)
            parameter.copy_(tensor)
    problems += [Problem(f"{name} is missing", file=str(folder)) for name in sorted(wanted.keys() - seen)]
    if problems:
        raise ModelError(problems)


def dequantized(folder: Path, device: torch.device | str = "cpu") -> Iterator[tuple[str, torch.Tensor]]:
    """The folder's tensors on `device` by their names in the plain model, packed ones unpacked to float32.

    Raises ModelError listing every tensor with a NaN, an infinity or a scale that isn't positive.
    """
    problems = []
    with weights.Reader(folder) as reader:

        def stored(name: str) -> torch.Tensor:
            return reader(name).to(device)

        for name in sorted(weights.tensors(folder)):
            module, _, kind = name.rpartition(".")
            if kind in SCALES:
                problems += _scale_problems(f"{module}.{SCALES[kind]}", stored(f"{module}.{SCALES[kind]}"), folder)
                unpack = _unpack_compressed_tensors if kind == "weight_packed" else _unpack_awq
                yield f"{module}.weight", unpack(partial(_part, stored, module))
            elif kind not in PARTS:
                tensor = stored(name)
                problems += _value_problems(name, tensor, folder)
                yield name, tensor
    if problems:
        raise ModelError(problems)


def _part(stored: Callable[[str], torch.Tensor], module: str, part: str) -> torch.Tensor:
    return stored(f"{module}.{part}")


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    """int32 of any shape → its eight 4-bit values in a new last dimension, lowest first."""
    import torch

    return (packed.unsqueeze(-1) >> torch.arange(0, 32, 4, dtype=torch.int32, device=packed.device)) & 15


def _unpack_compressed_tensors(part: Callable[[str], torch.Tensor]) -> torch.Tensor:
    """(out, in/8) int32 with (out, in/group) scales and (out/8, in/group) zero points → (out, in) float32."""
    rows, columns = (int(size) for size in part("weight_shape"))
    values = _nibbles(part("weight_packed")).reshape(rows, -1)[:, :columns].float()
    scale = part("weight_scale").float()
    try:
        zeros = _nibbles(part("weight_zero_point")).transpose(1, 2).reshape(-1, scale.shape[1])[:rows].float()
    except KeyError:  # symmetric: stored as value + 8
        zeros = scale.new_full(scale.shape, 8)
    group = columns // scale.shape[1]
    return (values - zeros.repeat_interleave(group, 1)) * scale.repeat_interleave(group, 1)


def _unpack_awq(part: Callable[[str], torch.Tensor]) -> torch.Tensor:
    """(in, out/8) int32 with (in/group, out) scales and (in/group, out/8) zero points → (out, in) float32."""
    import torch

    packed = part("qweight")
    column = torch.tensor(AWQ_ORDER, device=packed.device).argsort()
    values = _nibbles(packed)[..., column].flatten(1).float()
    zeros = _nibbles(part("qzeros"))[..., column].flatten(1).float()
    scale = part("scales").float()
    group = values.shape[0] // scale.shape[0]
    return ((values - zeros.repeat_interleave(group, 0)) * scale.repeat_interleave(group, 0)).T.contiguous()


def _scale_problems(name: str, scale: torch.Tensor, folder: Path) -> list[Problem]:
    problems = _value_problems(name, scale, folder)
    wrong = int((scale <= 0).sum())
    return problems + ([Problem(f"{name}: {wrong} scales aren't positive", file=str(folder))] if wrong else [])


def _value_problems(name: str, tensor: torch.Tensor, folder: Path) -> list[Problem]:
    if not tensor.is_floating_point():
        return []
    wrong = int((~tensor.isfinite()).sum())
    return (
        [Problem(f"{name}: {wrong} of {tensor.numel()} values are NaN or infinite", file=str(folder))] if wrong else []
    )


def quantization_of(folder: Path) -> dict[str, Any]:
    """The quantization_config of a folder's config.json."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return dict(config["quantization_config"])
