"""What test_quantize_awq.py looks at inside the train and autoawq environments; each command prints JSON.

python tests/quantize_proofs.py COMMAND ARGUMENT...
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny
import torch
from safetensors.torch import load_file, save_file

from pipeline import program, quantize, quantize_autoawq, quantize_check, quantize_llmcompressor, weights
from pipeline.errors import StageFailed, TunegateError
from pipeline.quantize_calibration import encode, load_tokenizer, read_rows

PROMPT = 30
ANSWER = 8


def make(tied: str, untied: str) -> None:
    """Two tiny models with weights as uneven as real ones (AWQ follows them) and a config in the new form."""
    for folder, options in ((Path(tied), {}), (Path(untied), {"tied": False, "layers": 1})):
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


def train(model: str, rows: str, spoiled: str, compressed: str, symmetric: str, *others: str) -> dict[str, Any]:
    """All that is asked in the train environment, in one process."""
    for folder in (compressed, symmetric):
        _as_compressed_tensors_reads(Path(folder))
    return {
        "names": [sorted(weights.tensors(Path(folder))) for folder in (compressed, symmetric, *others)],
        "tokens": _tokens(Path(model), Path(rows), theirs=True),
        "meaning": [_meaning(Path(model), Path(folder), Path(rows)) for folder in (compressed, others[0])],
        "spoiled": _spoiled(Path(model), Path(compressed), Path(spoiled)),
    }


def autoawq(model: str, rows: str, scratch: str, folder: str, request: str) -> dict[str, Any]:
    """All that is asked in the autoawq environment, in one process."""
    _as_autoawq_reads(Path(folder))
    loaded = quantize_autoawq.load(Path(model), Path(scratch))
    return {
        "tokens": _tokens(Path(model), Path(rows), theirs=False),
        "rope_theta": loaded.config.rope_theta,
        "frequency": float(loaded.model.rotary_emb.inv_freq[1]),
        "unmended": _unmended(Path(request)),
    }


def _tokens(model: Path, rows: Path, *, theirs: bool) -> list[list[int]]:
    """Calibration tokens, in the train environment compared with those of transformers' own tokenizer."""
    ids = encode(read_rows(rows), load_tokenizer(model))
    if theirs:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model)
        expected = [tokenizer.apply_chat_template(row["messages"], return_dict=False) for row in read_rows(rows)]
        assert ids == expected
    return ids


def _as_compressed_tensors_reads(folder: Path) -> None:
    """The folder's weights, unpacked by the stage's check and by compressed-tensors, are the same."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.quantization_config import CompressedTensorsConfig

    theirs = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=CompressedTensorsConfig(dequantize=True)
    ).state_dict()
    for name, weight in quantize_check.dequantized(folder):
        torch.testing.assert_close(weight.float(), theirs[name].float(), rtol=0.01, atol=1e-4)


def _as_autoawq_reads(folder: Path) -> None:
    """The folder's weights, unpacked by the stage's check and by AutoAWQ, are the same."""
    from awq.utils.packing_utils import dequantize_gemm

    packed = 0
    with weights.Reader(folder) as stored:
        for name, weight in quantize_check.dequantized(folder):
            module = name.removesuffix(".weight")
            if f"{module}.qweight" in weights.tensors(folder):
                parts = [stored(f"{module}.{part}") for part in ("qweight", "qzeros", "scales")]
                theirs = dequantize_gemm(*parts, 4, weight.shape[1] // parts[2].shape[0]).T.float()
                torch.testing.assert_close(weight, theirs, rtol=0.01, atol=1e-4)
                packed += 1
    assert packed == 14


def _meaning(model: Path, folder: Path, rows: Path) -> list[dict[str, Any]]:
    """By transformers, from the unpacked weights: each token's log-probability, and a greedy answer."""
    plain = quantize_llmcompressor.load(model, model)
    quantize_check.load_dequantized(plain, folder)
    found = []
    for ids in encode(read_rows(rows)[:4], load_tokenizer(model)):
        with torch.no_grad():
            chances = plain(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
            prompt = torch.tensor([ids[:PROMPT]])
            answer = plain.generate(prompt, max_new_tokens=ANSWER, do_sample=False)[0, PROMPT:]
        likely = chances[:-1].gather(1, torch.tensor(ids[1:]).unsqueeze(1))[:, 0]
        found.append({"ids": ids, "logprobs": likely.tolist(), "answer": answer.tolist()})
    return found


def _spoiled(model: Path, intact: Path, folder: Path) -> dict[str, Any]:
    """What comparing says of a folder with one tensor changed; None where it passes."""
    plain = quantize_llmcompressor.load(model, model)
    probe = [[1, *range(40, 90)]]
    original = quantize_check.read(plain, probe)
    good = load_file(intact / "model.safetensors")
    scale, norm = "model.layers.1.mlp.down_proj.weight_scale", "model.norm.weight"

    def answer(name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Any:
        changed = {**good, name: change(good[name].clone())}
        kept = {key: value.contiguous() for key, value in changed.items() if value is not None}
        save_file(kept, folder / "model.safetensors")
        try:
            quantize_check.compare(quantize_llmcompressor.load(model, model), folder, probe, original)
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


def _unmended(request: Path) -> str:
    """What the stage says of AutoAWQ's result when nothing is done about its search on a CPU."""
    mended = quantize_autoawq._quantizer_class

    def unmended(*args: Any) -> Any:
        quantizer = mended(*args)
        del quantizer._compute_best_scale
        return quantizer

    quantize_autoawq._quantizer_class = unmended
    raw = json.loads(request.read_text())
    try:
        return str(quantize.run(program.Request(raw["config"], raw["inputs"], Path(raw["folder"]))))
    except StageFailed as error:
        return str(error)


if __name__ == "__main__":
    real_stdout, sys.stdout = sys.stdout, sys.stderr
    print(json.dumps(globals()[sys.argv[1]](*sys.argv[2:])), file=real_stdout)
