"""AWQ through AutoAWQ 0.2.9: a plain model in, safetensors in AutoAWQ's GEMM format out.

Runs in the autoawq environment, whose transformers 4.51 reads a config.json of transformers 5 silently wrong:
it is handed one in the old form, and what it understood is compared. AutoAWQ itself has traps that are met
here: on a CPU its search for scales overwrites the weights it means to keep; samples longer than its limit
are skipped and the end of the last block dropped without a word; its search for clips takes minutes and
refuses layers whose width isn't a multiple of 64. A CPU without bf16 computes in float32; what isn't packed
is stored in the model's own dtype all the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline import compute_dtype, quantize_batches
from pipeline.errors import ModelError, Problem, StageFailed

SHARD_SIZE = "1GB"  # files are read side by side when what serves is held against its digest
EFFORT = {"cpu": {"search_tokens": 1024}, "cuda": {"search_tokens": 2**31}}
"""Tokens on which each of the 20 points of AutoAWQ's search for scales is tried."""


def old_form(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json of transformers 5 as transformers 4 writes it; one in the old form keeps its meaning.

    Raises ModelError for rope parameters that the old form has no place for.
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
            remedy="set quantize.method: llmcompressor",
        )
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in rope:
            old[key] = rope.pop(key)
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    old["rope_scaling"] = None if kind == "default" else {"rope_type": kind, **rope}
    return old


def misread(config: Mapping[str, Any], understood: Mapping[str, Any]) -> list[Problem]:
    """What transformers 4 understood otherwise than the old form of `config` says: one problem a key."""
    wanted = old_form(config)
    keys = sorted(key for key in wanted if key in understood and not key.startswith("_"))
    return [
        Problem(
            f"transformers 4 reads {understood[key]!r}, the model says {wanted[key]!r}",
            file="config.json",
            key=key,
        )
        for key in keys
        if _plain(understood[key]) != _plain(wanted[key])
    ] + [
        Problem("transformers 4 doesn't know this key", file="config.json", key=key)
        for key in ("rope_theta", "rope_scaling", "partial_rotary_factor")
        if wanted.get(key) is not None and key not in understood
    ]


def _plain(value: Any) -> Any:
    """Values as they are compared: a dtype by its name, a rope type under either of its keys."""
    if isinstance(value, Mapping):
        return {("rope_type" if key == "type" else key): part for key, part in value.items()}
    return (
        str(value).removeprefix("torch.")
        if value is not None and not isinstance(value, (int, float, str, list))
        else value
    )


def blocks(samples: Sequence[Sequence[int]], longest: int) -> list[list[int]]:
    """All samples end to end, cut into as few blocks of one length, at most `longest`, as hold them.

    AutoAWQ wants blocks of one length and drops what is left over: that is fewer tokens here than there are
    blocks.
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
            remedy="set quantize.method: llmcompressor",
        )
    old = _old_folder(folder, config, scratch / "old-form")
    understood = AutoConfig.from_pretrained(old, local_files_only=True, trust_remote_code=False)
    problems = misread(config, understood.to_dict())
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
    The config has seen to zero_point, without which there is no such format. Raises StageFailed when AutoAWQ
    left blocks out.
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
    """Blocks that a GPU has room for at once; None, all of them, is AutoAWQ's own way, which keeps their outputs there."""
    import torch

    if not torch.cuda.is_available():
        return None
    shape, tokens = quantize_batches.Shape.of(model.config), len(cut) * len(cut[0])
    free = quantize_batches.room(shape, tokens, torch.cuda.mem_get_info()[0])
    blocks_at_once = free // (shape.passing(0) * len(cut[0]))  # its attention keeps no scores
    return None if blocks_at_once >= len(cut) else max(1, blocks_at_once)


def _quantizer_class(cut: Sequence[Sequence[int]], search_tokens: int, on_layer: Callable[[int, int], None]) -> Any:
    """AutoAWQ's quantizer: keeps the weights it searches on, searches on part of the blocks, and reports."""
    import torch
    from awq.quantize.quantizer import AwqQuantizer

    tokens = len(cut) * len(cut[0])
    searched = max(1, search_tokens // len(cut[0]))

    class Quantizer(AwqQuantizer):  # type: ignore[misc]
        begun = 0

        def init_quant(self, *args: Any, **kwargs: Any) -> Any:
            modules, module_kwargs, inputs = super().init_quant(*args, **kwargs)
            seen = inputs.shape[:-1].numel()
            if seen != tokens:
                raise StageFailed(
                    f"AutoAWQ took {seen} of {tokens} calibration tokens",
                    remedy="report it with the versions of torch, transformers and autoawq",
                )
            return modules, module_kwargs, inputs

        def _get_input_feat(self, *args: Any, **kwargs: Any) -> Any:
            if self.begun:
                on_layer(self.begun, len(self.modules))
            self.begun += 1
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
                    x[:searched],
                    w_mean,
                    x_mean,
                    module2inspect,
                    linears2scale,
                    fp16_output[:searched],
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
            for some in tokens.split(quantize_batches.MOST_TOKENS):
                inputs = some.transpose(0, 1).to(w.device).float()
                moments += inputs.transpose(1, 2) @ inputs / tokens.shape[0]
            groups = w.reshape(w.shape[0], -1, size).transpose(0, 1)
            largest = groups.abs().amax(-1, keepdim=True)
            best, least = largest.clone(), torch.full_like(largest, torch.inf, dtype=torch.float32)
            for step in range(int(max_shrink * n_grid)):
                limit = largest * (1 - step / n_grid)
                clipped = torch.clamp(groups, -limit, limit)
                wrong = (self.pseudo_quantize_tensor(clipped.contiguous())[0] - groups).float()
                error = ((wrong @ moments) * wrong).sum(-1, keepdim=True)
                best = torch.where(error < least, limit, best)
                least = torch.minimum(error, least)
            return best.transpose(0, 1).contiguous()

    return Quantizer
