"""AWQ through llm-compressor: a plain model in, safetensors in compressed-tensors' pack-quantized format out.

Runs in the train environment. The recipe is llm-compressor's own, with these changes:

- on a CPU its cache must not pin memory: pinning needs an accelerator;
- on a CPU its grid search uses the first samples only. Activation statistics need all tokens; the choice among scales
  doesn't, and takes nearly all of the time;
- on a CPU without bf16 it computes in float32, and the result is stored in the model's own dtype all the same;
- on a GPU with room the model and the activations between its layers stay there, and samples go through in batches;
- losses are summed in float32: a bfloat16 sum over a large batch has too few digits to choose by.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline import compute_dtype
from pipeline.errors import StageFailed
from pipeline.model import weights
from pipeline.quantize import batches as quantize_batches
from pipeline.quantize.formats import decoder_layers, quantization_of

SHARD_SIZE = "1GB"  # files are read side by side when what serves is held against its digest
EFFORT = {
    "cpu": {"grid_points": 10, "search_tokens": 2048},
    "cuda": {"grid_points": 20, "search_tokens": 2**31},
}
"""Points of the search for scales, and tokens on which each is tried."""
MODEL_UP_TO = 0.5
"""Of a GPU's free memory: the rest is for activations."""


def load(folder: Path, _scratch: Path) -> Any:
    """The model of a Hugging Face folder, plain, in the dtype to compute in; on the GPU if it takes up to half of it."""
    import torch
    from transformers import AutoModelForCausalLM

    size = sum(file.stat().st_size for file in weights.files(folder))
    fits = torch.cuda.is_available() and size <= MODEL_UP_TO * torch.cuda.mem_get_info()[0]
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", local_files_only=True, trust_remote_code=False, device_map={"": 0} if fits else None
    ).eval()
    return compute_dtype.for_quantizing(model)


def quantize(
    model: Any,
    tokenizer: Any,
    samples: Sequence[Sequence[int]],
    *,
    group_size: int,
    zero_point: bool,
    observer: str,
    search_tokens: int,
    grid_points: int,
    folder: Path,
    on_layer: Callable[[int, int], None],
    batch_tokens: int | None = None,
) -> dict[str, Any]:
    """Quantize `model` in place, write safetensors into `folder`, return config.json's quantization_config.

    `samples` are token ids of one conversation each. `on_layer` hears how many of how many layers are done. A batch has up
    to `batch_tokens` tokens: 0 is a sample at a time, None as many as free memory has room for.
    Raises StageFailed when a layer saw fewer tokens than the samples hold.
    """
    from llmcompressor import oneshot
    from llmcompressor.core import reset_session
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from torch.utils.data import DataLoader

    scheme = {
        "num_bits": 4,
        "type": "int",
        "strategy": "group",
        "group_size": group_size,
        "symmetric": not zero_point,
        "observer": observer,
    }
    groups = {"group_0": {"targets": ["Linear"], "weights": scheme}}
    layers, tokens = len(decoder_layers(model)), sum(map(len, samples))
    awq = _awq_modifier(tokens, search_tokens, lambda number: on_layer(number, layers))(
        n_grid=grid_points, duo_scaling=True
    )
    if batch_tokens is None:
        batch_tokens = _place(model, samples)
    batches = quantize_batches.tensors(samples, batch_tokens)
    with no_pinning_without_accelerator():
        oneshot(
            model=model,
            processor=tokenizer,
            dataset=DataLoader(batches, batch_size=None),
            recipe=[awq, QuantizationModifier(config_groups=groups, ignore=["lm_head"])],
            pipeline="sequential",
            sequential_offload_device="cuda:0" if batch_tokens and model.device.type == "cuda" else "cpu",
            use_loss_mask="loss_mask" in batches[0],
        )
    compute_dtype.back_to_stored(model)  # before packing, so that values are rounded to the scales that are written
    model.save_pretrained(folder, save_compressed=True, max_shard_size=SHARD_SIZE)
    reset_session()  # it holds the model
    return quantization_of(folder)


def _place(model: Any, samples: Sequence[Sequence[int]]) -> int:
    """Tokens of a batch beside the model where it lies; without room for two samples it goes back to the CPU."""
    import torch

    if not torch.cuda.is_available():
        return 0
    torch.cuda.empty_cache()
    shape, lengths = quantize_batches.Shape.of(model.config), [len(sample) for sample in samples]
    if model.device.type == "cuda":
        tokens = quantize_batches.batch_tokens(shape, lengths, torch.cuda.mem_get_info()[0])
        if tokens:
            return tokens
        model.to("cpu")
        torch.cuda.empty_cache()
    return quantize_batches.batch_tokens(shape, lengths, torch.cuda.mem_get_info()[0])


def _awq_modifier(tokens: int, search_tokens: int, on_done: Callable[[int], None]) -> Any:
    """llm-compressor's AWQ modifier: counts what it sees, searches on part of it, sums in float32, reports each layer."""
    import torch
    from llmcompressor.core import active_session
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from pydantic import PrivateAttr

    class Search(AWQModifier):  # type: ignore[misc]
        _layers: int = PrivateAttr(default=0)

        def on_sequential_epoch_end(self, state: Any, event: Any, **kwargs: Any) -> None:
            counts = {int(count) for _, count in self._smooth_activation_stats.values()}
            if counts - {tokens}:
                raise StageFailed(
                    f"llm-compressor saw {min(counts)} of {tokens} calibration tokens",
                    remedy="report it with the versions of torch, transformers and llmcompressor",
                )
            super().on_sequential_epoch_end(state, event, **kwargs)
            if counts:
                self._layers += 1
                on_done(self._layers)

        def _run_samples(self, module: Any) -> list[Any]:
            outputs, tokens = [], 0
            for batch in self._parent_args_cache[module]:
                output = module(**batch)
                outputs.append(output[0] if isinstance(output, tuple) else output)
                tokens += outputs[-1].shape[:-1].numel()
                if tokens >= search_tokens:
                    break
            return outputs

        def _compute_loss(self, fp16_outputs: list[Any], int_w_outputs: list[Any]) -> float:
            masks = active_session().state.loss_masks
            total, count = torch.zeros((), device=fp16_outputs[0].device), 0
            for at, (exact, approximate) in enumerate(zip(fp16_outputs, int_w_outputs, strict=True)):
                wrong = torch.linalg.vector_norm(approximate - exact, dim=-1, dtype=torch.float32).square()
                wrong = wrong[masks[at].bool()] if masks else wrong
                total += wrong.sum()
                count += wrong.numel() * exact.shape[-1]
            return float(total) / count

    return Search


@contextmanager
def no_pinning_without_accelerator() -> Iterator[None]:
    """Without an accelerator, make IntermediatesCache.pin_memory do nothing: torch refuses to pin there."""
    import torch
    from llmcompressor.pipelines.cache import IntermediatesCache

    if torch.accelerator.is_available():
        yield
        return
    original = IntermediatesCache.pin_memory
    IntermediatesCache.pin_memory = lambda *_args, **_kwargs: None
    try:
        yield
    finally:
        IntermediatesCache.pin_memory = original
