"""What test_awq.py does and looks at inside the train and autoawq environments, a process a method.

    python tests/proofs/quantize_proofs.py METHOD FOLDER

FOLDER/METHOD/requests.json holds what the stage is asked by name; each is answered in FOLDER/METHOD/NAME/. What was
answered and seen is written to seen.json beside it. The train environment makes the models and so comes first.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file, save_file
from support import tiny

from pipeline import program
from pipeline.errors import StageFailed, TunegateError
from pipeline.model import special_tokens, weights
from pipeline.quantize import autoawq, check, formats, llmcompressor, quantize
from pipeline.quantize.calibration import Sample, encode, load_tokenizer, read_rows

PROMPT = 30
ANSWER = 8
FULL = ((llmcompressor, "quantize"), (formats, "load_dequantized"))
MODELS = {"merge": {}, "untied": {"tied": False, "layers": 1}}


def prove(method: str, folder: Path) -> dict[str, Any]:
    """Quantize as asked, and look at what came of it."""
    if method == "llmcompressor":
        for name, options in MODELS.items():
            make(folder / name / "payload", **options)
    asked = json.loads((folder / method / "requests.json").read_text())
    details = {name: quantize.run(request(folder, method, name, raw)) for name, raw in asked.items()}
    model, made = folder / "merge" / "payload", folder / method / "first" / "payload"
    tokenizer = load_tokenizer(model)
    rows = read_rows(folder / "prepare" / "payload" / "calibration.jsonl")
    samples = encode(rows, tokenizer, special_tokens.end_tokens(model, tokenizer))
    plain = {"llmcompressor": llmcompressor, "autoawq": autoawq}[method].load(model, folder / method)
    formats.load_dequantized(plain, made)
    look = {"llmcompressor": _in_train, "autoawq": _in_autoawq}[method]
    return {
        "details": details,
        "tokens": [sample.ids for sample in samples],
        "meaning": [_meaning(plain, list(sample.ids)) for sample in samples[:4]],
        **look(folder, asked, samples),
    }


def make(folder: Path, **options: Any) -> None:
    """A tiny model with weights as uneven as real ones (AWQ follows them) and a config in the new form."""
    tiny.make(folder, **options)
    generator = torch.Generator().manual_seed(1)
    uneven = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        columns = torch.randn(weight.shape[-1], generator=generator).exp().to(weight.dtype)
        uneven[name] = weight * columns if ".layers." in name else weight
    save_file(uneven, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    del config["rope_theta"], config["torch_dtype"]
    config["rope_parameters"]["rope_theta"] = 50000.0
    (folder / "config.json").write_text(json.dumps(config))


def request(folder: Path, method: str, name: str, raw: dict[str, Any]) -> program.Request:
    """What the flow would hand the stage; `raw` is its config section and the model's name."""
    inputs = {
        stage: {
            "stage": stage,
            "key": "k",
            "path": str(path),
            "digest": "d",
            "parents": {},
            "made_by": {},
            "detail": {},
        }
        for stage, path in (("merge", folder / raw["model"]), ("prepare", folder / "prepare"))
    }
    (folder / method / name).mkdir(exist_ok=True)
    return program.Request({"quantize": raw["quantize"], "seed": 1}, inputs, folder / method / name)


def _in_train(folder: Path, asked: dict[str, Any], samples: list[Sample]) -> dict[str, Any]:
    """What transformers 5, compressed-tensors and the stage's own check make of it."""
    from transformers import AutoTokenizer

    model, made = folder / "merge" / "payload", folder / "llmcompressor"
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = read_rows(folder / "prepare" / "payload" / "calibration.jsonl")
    theirs = [tuple(tokenizer.apply_chat_template(row["messages"], return_dict=False)) for row in rows]
    assert [sample.ids for sample in samples] == theirs
    assert {sample.ids[sample.judged][-1] for sample in samples} == {tokenizer.eos_token_id}
    for name in asked.keys() - {"again"}:
        _as_compressed_tensors_reads(made / name / "payload")
    return {
        "spoiled": _spoiled(model, made / "first" / "payload", folder / "spoiled"),
        "full": [_full(request(folder, "llmcompressor", "full", asked["first"]), *where) for where in FULL],
    }


def _in_autoawq(folder: Path, asked: dict[str, Any], _samples: list[Sample]) -> dict[str, Any]:
    """What transformers 4 and AutoAWQ make of it, and what comes of AutoAWQ left as it is."""
    made = folder / "autoawq"
    _as_autoawq_reads(made / "first" / "payload")
    loaded = autoawq.load(folder / "merge" / "payload", made)
    return {
        "rope_theta": loaded.config.rope_theta,
        "frequency": float(loaded.model.rotary_emb.inv_freq[1]),
        "few at once": _few_at_once(request(folder, "autoawq", "few", asked["first"])),
        "unmended": _unmended(request(folder, "autoawq", "unmended", asked["first"])),  # last: it stays so
    }


def _as_compressed_tensors_reads(folder: Path) -> None:
    """The folder's weights, unpacked by the stage's check and by compressed-tensors, are the same."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.quantization_config import CompressedTensorsConfig

    theirs = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=CompressedTensorsConfig(dequantize=True)
    ).state_dict()
    for name, weight in formats.dequantized(folder):
        torch.testing.assert_close(weight.float(), theirs[name].float(), rtol=0.01, atol=1e-4)


def _as_autoawq_reads(folder: Path) -> None:
    """The folder's weights, unpacked by the stage's check and by AutoAWQ, are the same."""
    from awq.utils.packing_utils import dequantize_gemm

    packed = 0
    with weights.Reader(folder) as stored:
        for name, weight in formats.dequantized(folder):
            module = name.removesuffix(".weight")
            if f"{module}.qweight" in weights.tensors(folder):
                parts = [stored(f"{module}.{part}") for part in ("qweight", "qzeros", "scales")]
                theirs = dequantize_gemm(*parts, 4, weight.shape[1] // parts[2].shape[0]).T.float()
                torch.testing.assert_close(weight, theirs, rtol=0.01, atol=1e-4)
                packed += 1
    assert packed == 14


def _meaning(plain: Any, ids: list[int]) -> dict[str, Any]:
    """By transformers, from the unpacked weights: each token's log-probability, and a greedy answer."""
    with torch.no_grad():
        chances = plain(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
        answer = plain.generate(torch.tensor([ids[:PROMPT]]), max_new_tokens=ANSWER, do_sample=False)[0, PROMPT:]
    likely = chances[:-1].gather(1, torch.tensor(ids[1:]).unsqueeze(1))[:, 0]
    return {"ids": ids, "logprobs": likely.tolist(), "answer": answer.tolist()}


def _spoiled(model: Path, intact: Path, folder: Path) -> dict[str, Any]:
    """What comparing says of a folder with one tensor changed; None where it passes."""
    folder.mkdir()
    plain = llmcompressor.load(model, model)
    probe = [Sample((1, *range(40, 90)))]
    original = check.read(plain, probe)
    good = load_file(intact / "model.safetensors")
    scale, norm = "model.layers.1.mlp.down_proj.weight_scale", "model.norm.weight"

    def answer(name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Any:
        changed = {**good, name: change(good[name].clone())}
        kept = {key: value.contiguous() for key, value in changed.items() if value is not None}
        save_file(kept, folder / "model.safetensors")
        try:
            check.compare(llmcompressor.load(model, model), folder, probe, original)
        except TunegateError as error:
            return error.to_json()
        return None

    return {
        "intact": answer(scale, lambda tensor: tensor),
        "larger": answer(scale, lambda tensor: tensor * 5),
        "negative": answer(scale, lambda tensor: -tensor),
        "nan": answer(scale, lambda tensor: tensor.index_fill_(0, torch.tensor([3]), torch.nan)),
        "infinite": answer(norm, lambda tensor: tensor * torch.inf),
        "missing": answer(norm, lambda _tensor: None),
    }


def _full(asked: program.Request, module: ModuleType, name: str) -> dict[str, Any]:
    """What the stage says when CUDA has no memory left in one of its steps."""

    def full(*_args: Any, **_kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 79.10 GiB\nmore")

    with patch.object(module, name, full):
        try:
            quantize.run(asked)
        except TunegateError as error:
            return error.to_json()
    raise AssertionError("nothing was raised")


def _few_at_once(asked: program.Request) -> dict[str, Any]:
    """The stage's detail when AutoAWQ takes three blocks at a time, as where a GPU has little room."""
    with patch.object(autoawq, "_at_once", lambda _model, _cut: 3):
        return quantize.run(asked)


def _unmended(asked: program.Request) -> str:
    """What the stage says of AutoAWQ's result when nothing is done about its search on a CPU."""
    mended = autoawq._quantizer_class

    def unmended(*args: Any) -> Any:
        quantizer = mended(*args)
        del quantizer._compute_best_scale
        return quantizer

    autoawq._quantizer_class = unmended
    try:
        return str(quantize.run(asked))
    except StageFailed as error:
        return str(error)


if __name__ == "__main__":
    home = Path(sys.argv[2])
    (home / sys.argv[1] / "seen.json").write_text(json.dumps(prove(sys.argv[1], home)))
