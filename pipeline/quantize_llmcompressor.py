"""AWQ through llm-compressor: a plain model in, safetensors in compressed-tensors' pack-quantized format out.

Runs in the train environment. Two things are done to llm-compressor: on a CPU its cache must not pin memory
(pinning needs an accelerator), and its grid search looks at the first batches only, because activation
statistics want all tokens while the choice among scales doesn't, and takes nearly all of the time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.errors import StageFailed
from pipeline.quantize_check import decoder_layers, quantization_of

SHARD_SIZE = "5GB"
EFFORT = {
    "cpu": {"grid_points": 10, "search_tokens": 2048},
    "cuda": {"grid_points": 20, "search_tokens": 2**31},
}
"""Points of the search for scales, and tokens on which each is tried."""


def load(folder: Path, _scratch: Path) -> Any:
    """The model of a Hugging Face folder, plain, in the dtype it is stored in, on the CPU."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", local_files_only=True, trust_remote_code=False
    ).eval()


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
) -> dict[str, Any]:
    """Quantize `model` in place, write safetensors into `folder`, return config.json's quantization_config.

    `samples` are token ids of one conversation each. `on_layer` hears how many of how many layers are done.
    Raises StageFailed when a layer saw fewer tokens than the samples hold.
    """
    import torch
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from torch.utils.data import DataLoader

    weights = {
        "num_bits": 4,
        "type": "int",
        "strategy": "group",
        "group_size": group_size,
        "symmetric": not zero_point,
        "observer": observer,
    }
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    layers, tokens = len(decoder_layers(model)), sum(map(len, samples))
    awq = _awq_modifier(tokens, search_tokens, lambda done: on_layer(done, layers))(
        n_grid=grid_points, duo_scaling=True
    )
    batches = [{"input_ids": torch.tensor([sample])} for sample in samples]
    with _no_pinning_without_accelerator():
        oneshot(
            model=model,
            processor=tokenizer,
            dataset=DataLoader(batches, batch_size=None),
            recipe=[awq, QuantizationModifier(config_groups=groups, ignore=["lm_head"])],
            pipeline="sequential",
        )
    model.save_pretrained(folder, save_compressed=True, max_shard_size=SHARD_SIZE)
    return quantization_of(folder)


def _awq_modifier(tokens: int, search_tokens: int, on_done: Callable[[int], None]) -> Any:
    """llm-compressor's AWQ modifier: counts what it sees, searches on part of it, reports each layer."""
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from pydantic import PrivateAttr

    class SearchOnPart(AWQModifier):  # type: ignore[misc]
        _done: int = PrivateAttr(default=0)

        def on_sequential_epoch_end(self, state: Any, event: Any, **kwargs: Any) -> None:
            counts = {int(count) for _, count in self._smooth_activation_stats.values()}
            if counts - {tokens}:
                raise StageFailed(
                    f"llm-compressor saw {min(counts)} of {tokens} calibration tokens",
                    remedy="report it with the versions of torch, transformers and llmcompressor",
                )
            super().on_sequential_epoch_end(state, event, **kwargs)
            if counts:
                self._done += 1
                on_done(self._done)

        def _run_samples(self, module: Any) -> list[Any]:
            outputs, seen = [], 0
            for batch in self._parent_args_cache[module]:
                output = module(**batch)
                outputs.append(output[0] if isinstance(output, tuple) else output)
                seen += outputs[-1].shape[:-1].numel()
                if seen >= search_tokens:
                    break
            return outputs

    return SearchOnPart


@contextmanager
def _no_pinning_without_accelerator() -> Iterator[None]:
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
