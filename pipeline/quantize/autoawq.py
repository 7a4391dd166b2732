"""AWQ through AutoAWQ 0.2.9: a plain model in, safetensors in AutoAWQ's GEMM format out.

Runs in the autoawq environment, whose transformers 4.51 silently misreads a config.json of transformers 5. So the model
comes with one in the old form, and the config that transformers loads is compared with it.

AutoAWQ's traps, each met here:

- on a CPU its search for scales overwrites the weights that it means to keep;
- it silently skips samples longer than its limit, and drops the end of the last block;
- its search for clips takes minutes, and refuses layers whose width isn't a multiple of 64.

A CPU without bf16 computes in float32; unpacked weights are stored in the model's own dtype all the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline import compute_dtype
from pipeline.errors import ModelError, Problem, StageFailed
from pipeline.quantize import batches

SHARD_SIZE = "1GB"  # files are read side by side when what serves is held against its digest
EFFORT = {"cpu": {"search_tokens": 1024}, "cuda": {"search_tokens": 2**31}}
"""Tokens on which each of the 20 points of AutoAWQ's search for scales is tried."""
USE_LLMCOMPRESSOR = "set quantize.backend: llmcompressor"


def old_form(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json of transformers 5 as transformers 4 writes it; one in the old form keeps its meaning.

    Raises ModelError for rope parameters that the old form can't express.
    """
    old = {
        key: value for key, value in config.items() if key not in ("rope_parameters", "dtype", "transformers_version")
    }
    if "dtype" in config:
        old["torch_dtype"] = config["dtype"]
    rope = dict(config.get("rope_parameters") or {})
    if not rope:
        return old
    if any(isinstance(value, dict) for value in rope.values()):
        raise ModelError(
            f"rope parameters that differ by layer ({', '.join(sorted(rope))}) can't be written for AutoAWQ",
            key="rope_parameters",
            remedy=USE_LLMCOMPRESSOR,
        )
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in rope:
            old[key] = rope.pop(key)
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    old["rope_scaling"] = None if kind == "default" else {"rope_type": kind, **rope}
    return old


def misread(config: Mapping[str, Any], transformers_config: Mapping[str, Any]) -> list[Problem]:
    """Keys that transformers 4 reads otherwise than the old form of `config` says: one problem a key."""
    old = old_form(config)
    keys = sorted(key for key in old if key in transformers_config and not key.startswith("_"))
    return [
        Problem(
            f"transformers 4 reads {transformers_config[key]!r}, the model says {old[key]!r}",
            file="config.json",
            key=key,
            remedy=USE_LLMCOMPRESSOR,
        )
        for key in keys
        if _plain(transformers_config[key]) != _plain(old[key])
    ] + [
        Problem("is a key that transformers 4 doesn't know", file="config.json", key=key, remedy=USE_LLMCOMPRESSOR)
        for key in ("rope_theta", "rope_scaling", "partial_rotary_factor")
        if old.get(key) is not None and key not in transformers_config
    ]


def _plain(value: Any) -> Any:
    """The form in which settings are compared: a dtype by its name, a rope type under either of its keys."""
    if isinstance(value, Mapping):
        return {("rope_type" if key == "type" else key): part for key, part in value.items()}
    return (
        str(value).removeprefix("torch.")
        if value is not None and not isinstance(value, (int, float, str, list))
        else value
    )


def blocks(samples: Sequence[Sequence[int]], longest: int) -> list[list[int]]:
    """All samples end to end, cut into as few blocks of one length, at most `longest`, as hold them.

    AutoAWQ wants blocks of one length. The rest is dropped: fewer tokens than there are blocks.
    """
    stream = [token for sample in samples for token in sample]
    number = -(-len(stream) // longest)
    length = len(stream) // number
    return [stream[start * length : (start + 1) * length] for start in range(number)]


def load(folder: Path, scratch: Path) -> Any:
    """The model of a Hugging Face folder, plain, in the dtype to compute in, on the CPU.

    Raises ModelError when AutoAWQ doesn't know the architecture or transformers 4 misreads its config.json.
    """
    from awq.models.auto import AWQ_CAUSAL_LM_MODEL_MAP
    from transformers import AutoConfig, AutoModelForCausalLM

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config["model_type"] not in AWQ_CAUSAL_LM_MODEL_MAP:
        raise ModelError(
            f"AutoAWQ 0.2.9 doesn't know the model type {config['model_type']}",
            file=str(folder / "config.json"),
            allowed=", ".join(sorted(AWQ_CAUSAL_LM_MODEL_MAP)),
            remedy=USE_LLMCOMPRESSOR,
        )
    old = _old_folder(folder, config, scratch / "old-form")
    transformers_config = AutoConfig.from_pretrained(old, local_files_only=True, trust_remote_code=False)
    problems = misread(config, transformers_config.to_dict())
    if problems:
        raise ModelError(problems)
    model = AutoModelForCausalLM.from_pretrained(
        old, torch_dtype="auto", local_files_only=True, trust_remote_code=False, use_safetensors=True
    )
    model.config.use_cache = False
    return compute_dtype.for_quantizing(model.eval())


def _old_folder(folder: Path, config: Mapping[str, Any], old: Path) -> Path:
    """A folder beside the original: config.json in the old form, links to everything else."""
    old.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        link = old / path.name
        link.unlink(missing_ok=True)
        link.symlink_to(path.resolve())
    (old / "config.json").unlink()
    (old / "config.json").write_text(json.dumps(old_form(config), indent=1), encoding="utf-8")
    return old


def quantize(
    model: Any,
    _tokenizer: Any,
    samples: Sequence[Sequence[int]],
    *,
    group_size: int,
    zero_point: bool,
    search_tokens: int,
    folder: Path,
    on_layer: Callable[[int, int], None],
) -> dict[str, Any]:
    """Quantize `model` in place, write safetensors into `folder`, return config.json's quantization_config.

    `samples` are token ids of one conversation each. `on_layer` hears how many of how many layers are done.
    The format always has a zero point; the config admits no other. Raises StageFailed when AutoAWQ left blocks out.
    """
    from awq.models._config import AwqConfig
    from awq.models.auto import AWQ_CAUSAL_LM_MODEL_MAP

    kind = model.config.model_type
    settings = {"zero_point": zero_point, "q_group_size": group_size, "w_bit": 4, "version": "GEMM"}
    awq = AWQ_CAUSAL_LM_MODEL_MAP[kind](model, kind, False, model.config, AwqConfig(), None)
    cut = blocks(samples, max(map(len, samples)))
    awq.quantize(
        None,
        settings,
        calib_data=cut,
        max_calib_samples=len(cut),
        max_calib_seq_len=len(cut[0]),
        n_parallel_calib_samples=_at_once(model, cut),
        quantizer_cls=_quantizer_class(cut, search_tokens, on_layer),
    )
    on_layer(len(awq.quantizer.modules), len(awq.quantizer.modules))
    compute_dtype.back_to_stored(model)
    awq.save_quantized(str(folder), shard_size=SHARD_SIZE)
    return dict(awq.quant_config.to_transformers_dict())


def _at_once(model: Any, cut: Sequence[Sequence[int]]) -> int | None:
    """Blocks that a GPU has room for at once. None means all: AutoAWQ's own way, which keeps their outputs on the GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    shape, tokens = batches.Shape.of(model.config), len(cut) * len(cut[0])
    free = batches.room(shape, tokens, torch.cuda.mem_get_info()[0])
    blocks_at_once = free // (shape.passing(0) * len(cut[0]))  # its attention keeps no scores
    return None if blocks_at_once >= len(cut) else max(1, blocks_at_once)


def _quantizer_class(cut: Sequence[Sequence[int]], search_tokens: int, on_layer: Callable[[int, int], None]) -> Any:
    """AutoAWQ's quantizer: keeps the weights it searches on, searches on part of the blocks, and reports."""
    import torch
    from awq.quantize.quantizer import AwqQuantizer

    tokens = len(cut) * len(cut[0])
    search_blocks = max(1, search_tokens // len(cut[0]))

    class Quantizer(AwqQuantizer):  # type: ignore[misc]
        layers_begun = 0

        def init_quant(self, *args: Any, **kwargs: Any) -> Any:
            modules, module_kwargs, inputs = super().init_quant(*args, **kwargs)
            tokens_taken = inputs.shape[:-1].numel()
            if tokens_taken != tokens:
                raise StageFailed(
                    f"AutoAWQ took {tokens_taken} of {tokens} calibration tokens",
                    remedy="report it with the versions of torch, transformers and autoawq",
                )
            return modules, module_kwargs, inputs

        def _get_input_feat(self, *args: Any, **kwargs: Any) -> Any:
            if self.layers_begun:
                on_layer(self.layers_begun, len(self.modules))
            self.layers_begun += 1
            return super()._get_input_feat(*args, **kwargs)

        def _compute_best_scale(
            self,
            x: Any,
            w_mean: Any,
            x_mean: Any,
            module2inspect: Any,
            linears2scale: Any,
            fp16_output: Any,
            kwargs: Any,
        ) -> Any:
            # It keeps the original weights by .cpu(), no copy on a CPU, and then multiplies them in place.
            aliasing = module2inspect.state_dict
            module2inspect.state_dict = lambda: {name: value.clone() for name, value in aliasing().items()}
            try:
                return super()._compute_best_scale(
                    x[:search_blocks],
                    w_mean,
                    x_mean,
                    module2inspect,
                    linears2scale,
                    fp16_output[:search_blocks],
                    kwargs,
                )
            finally:
                del module2inspect.state_dict

        def _compute_best_clip(
            self,
            w: Any,
            input_feat: Any,
            n_grid: int = 20,
            max_shrink: float = 0.5,
            n_sample_token: int = 512,
        ) -> Any:
            # The same squared error of a group's output, by second moments: E[(x·d)²] = d·E[xxᵀ]·d.
            del n_sample_token
            size = self.group_size
            tokens = input_feat.reshape(-1, w.shape[1] // size, size)
            moments = torch.zeros(w.shape[1] // size, size, size, device=w.device)
            for chunk in tokens.split(batches.MOST_TOKENS):
                inputs = chunk.transpose(0, 1).to(w.device).float()
                moments += inputs.transpose(1, 2) @ inputs / tokens.shape[0]
            groups = w.reshape(w.shape[0], -1, size).transpose(0, 1)
            largest = groups.abs().amax(-1, keepdim=True)
            best, least = largest.clone(), torch.full_like(largest, torch.inf, dtype=torch.float32)
            for step in range(int(max_shrink * n_grid)):
                limit = largest * (1 - step / n_grid)
                clamp = torch.clamp(groups, -limit, limit)
                wrong = (self.pseudo_quantize_tensor(clamp.contiguous())[0] - groups).float()
                error = ((wrong @ moments) * wrong).sum(-1, keepdim=True)
                best = torch.where(error < least, limit, best)
                least = torch.minimum(error, least)
            return best.transpose(0, 1).contiguous()

    return Quantizer
