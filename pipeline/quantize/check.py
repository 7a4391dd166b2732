"""Whether a quantized folder is near its original: unpacked from its bytes and compared, layer by layer and as a whole.

Methods may rescale weights between layers, so single weights aren't compared. Compared are each decoder layer's output on
the original's own input, and the perplexity of the whole. For decoders whose layers are a list.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import Problem, StageFailed
from pipeline.quantize import formats
from pipeline.quantize.calibration import Sample

if TYPE_CHECKING:
    import torch

MAX_LAYER_ERROR = 0.6
MAX_PERPLEXITY_RATIO = 3.0
RETRY = "set another quantize.backend (AutoAWQ is known to do this on a CPU) or quantize.method: none, and report it"


@dataclass(frozen=True)
class Reading:
    """A model's work on the probe samples.

    `perplexity` is that of their answers. `layers` holds each decoder layer's call for each sample, on the CPU.
    """

    perplexity: float
    layers: tuple[tuple[LayerCall, ...], ...]


@dataclass(frozen=True)
class LayerCall:
    """One call of a decoder layer: output = `before` + `update`, both of shape (tokens, hidden)."""

    before: torch.Tensor
    update: torch.Tensor


@dataclass(frozen=True)
class Comparison:
    """The quantized model on the same samples: perplexity, and each layer's error as in `layer_errors`."""

    perplexity: float
    layer_errors: tuple[float, ...]


def read(model: Any, samples: Sequence[Sample]) -> Reading:
    """Run the original model on token-id samples (on a GPU if it fits) and keep its layers' calls."""
    layers = formats.decoder_layers(model)
    calls: list[list[LayerCall]] = [[] for _ in layers]

    def keep(index: int) -> Callable[..., None]:
        def hook(_layer: Any, args: tuple[Any, ...], output: Any) -> None:
            before = args[0][0]
            calls[index].append(LayerCall(before.cpu(), (_states(output)[0] - before).cpu()))

        return hook

    handles = [layer.register_forward_hook(keep(index)) for index, layer in enumerate(layers)]
    with _on_accelerator(model), _removing(handles):
        answers_perplexity = perplexity(model, samples)
    return Reading(answers_perplexity, tuple(tuple(call) for call in calls))


def compare(model: Any, folder: Path, samples: Sequence[Sample], original: Reading) -> Comparison:
    """Give a plain model the quantized folder's weights and compare it with the original's reading.

    Raises ModelError for broken tensors. Raises StageFailed when a layer or the whole differs by more than rounding.
    """
    with _on_accelerator(model):
        formats.load_dequantized(model, folder)
        comparison = Comparison(perplexity(model, samples), tuple(layer_errors(model, samples, original)))
    problems = [
        Problem(
            f"layer {index} differs from the original: median relative error {error:.2f}",
            allowed=f"up to {MAX_LAYER_ERROR}",
            remedy=RETRY,
        )
        for index, error in enumerate(comparison.layer_errors)
        if not error <= MAX_LAYER_ERROR
    ]
    if not comparison.perplexity <= MAX_PERPLEXITY_RATIO * original.perplexity:
        problems.append(
            Problem(
                f"perplexity of the answers went from {original.perplexity:.2f} to {comparison.perplexity:.2f}",
                allowed=f"up to {MAX_PERPLEXITY_RATIO:g} times as much",
                remedy=RETRY,
            )
        )
    if problems:
        raise StageFailed([Problem("the quantizer corrupted the weights", file=str(folder), remedy=RETRY), *problems])
    return comparison


def layer_errors(model: Any, samples: Sequence[Sample], original: Reading) -> list[float]:
    """For each decoder layer of the quantized model, the median over tokens of |update' - update| / |update|.

    Every layer is fed the original's input, so that one layer's error isn't charged to the next.
    """
    import torch

    layers = formats.decoder_layers(model)
    errors: list[list[torch.Tensor]] = [[] for _ in layers]

    def swap(index: int) -> Callable[..., Any]:
        def hook(_layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            call = original.layers[index][len(errors[index])]
            return (call.before.unsqueeze(0).to(args[0]), *args[1:]), kwargs

        return hook

    def compare(index: int) -> Callable[..., None]:
        def hook(_layer: Any, _args: tuple[Any, ...], output: Any) -> None:
            call = original.layers[index][len(errors[index])]
            update = _states(output)[0].cpu().float() - call.before.float()
            distance = (update - call.update.float()).norm(dim=-1)
            errors[index].append(distance / call.update.float().norm(dim=-1).clamp(min=1e-6))

        return hook

    handles = [layer.register_forward_pre_hook(swap(index), with_kwargs=True) for index, layer in enumerate(layers)]
    handles += [layer.register_forward_hook(compare(index)) for index, layer in enumerate(layers)]
    with _removing(handles):
        perplexity(model, samples)
    return [float(torch.cat(layer).median()) for layer in errors]


def perplexity(model: Any, samples: Sequence[Sample]) -> float:
    """exp(mean negative log-likelihood of the answers' tokens, given the text before them); inf on overflow or NaN."""
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


@contextmanager
def _on_accelerator(model: Any) -> Iterator[None]:
    """Hold the model on a GPU with room for it, then put it back where it was."""
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
    """Remove hooks at the end, even after an error."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _states(output: Any) -> Any:
    """A decoder layer returns its hidden states, alone or first (transformers 4)."""
    return output[0] if isinstance(output, tuple) else output
