"""Measure the figures of test_cuda_graphs.py, on a tiny model in the train environment.

    python tests/proofs/graph_proofs.py BASE (a Hugging Face folder)

Prints one JSON object; the graphs themselves are measured where there is a GPU.
"""

from __future__ import annotations

import json
import random
import sys
from array import array
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from pipeline.config.schema import FinetuneConfig
from pipeline.finetune import cuda_graphs, loss, train
from pipeline.finetune import model as finetune_model
from pipeline.finetune.execution import Execution
from pipeline.finetune.packing import IGNORED, Row

LONGEST = 256


def some_rows(seed: int, lengths: range) -> list[Row]:
    """Random rows whose last fifth is trained."""
    draw = random.Random(seed)
    found = []
    for _ in range(12):
        ids = draw.choices(range(5, 200), k=draw.choice(lengths))
        untrained = len(ids) - max(1, len(ids) // 5)
        labels = [IGNORED] * untrained + ids[untrained:]
        found.append(Row(array("i", ids), array("i", labels), 0, is_cut=False))
    return found


def made(base: Path, dropout: float) -> tuple[Any, Execution]:
    """A model with adapters that already change what it says."""
    settings = FinetuneConfig(lora_dropout=dropout, micro_batch_size=64)
    model, execution = finetune_model.load(base, settings, LONGEST)
    model = finetune_model.with_lora(model, settings, execution, "0" * 64, seed=1)
    torch.manual_seed(5)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    return model, execution


def padding(base: Path) -> dict[str, Any]:
    """A pass's loss as it is and padded, on this device."""
    model, execution = made(base, 0.0)
    execution = replace(execution, shares_prefixes=False)
    it = loss.inputs(some_rows(1, range(3, 60)), execution)
    shape = cuda_graphs.shape_of(it)
    filled = cuda_graphs.padded(it, shape, LONGEST)
    with torch.no_grad():
        losses = [float(loss.loss_of(model, loss.to_device(one, execution.device), execution)) for one in (it, filled)]
    return {"losses": losses, "tokens": [len(it.ids), len(filled.ids)], "trained": [len(it.at), len(filled.at)]}


def rooms(base: Path) -> dict[str, Any]:
    """Recordings that find no room or fail; a recording here replays the pass as it is."""
    model, execution = made(base, 0.0)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    train.flatten(weights)
    errors: list[str] = []
    torch.cuda.set_stream = lambda _stream: None
    torch.cuda.default_stream = lambda: None

    class Told(cuda_graphs.Graphs):
        def _record(self, it: Any) -> Any:
            if errors:
                raise RuntimeError(errors.pop(0))
            return SimpleNamespace(replay=lambda it, scale: self._add(loss.to_device(it, execution.device), scale))

    graphs = Told(model, weights, [weight.grad for weight in weights], execution, LONGEST)
    short, long, longest = (
        some_rows(seed, lengths) for seed, lengths in enumerate((range(3, 9), range(50, 60), range(100, 110)))
    )
    full = "CUDA out of memory. Tried to allocate 2 GiB"
    kept = []
    for rows, meets in (
        (short, []),
        (short, []),
        (long, [full]),
        (short, []),
        (longest, ["not permitted in a capture"]),
    ):
        errors[:] = meets
        graphs(rows, 100)
        kept.append([len(graphs._recorded), graphs.works])
    alone = Told(model, weights, [weight.grad for weight in weights], execution, LONGEST)
    alone(short, 100)
    errors[:] = [full]
    try:
        alone(short, 100)
    except torch.OutOfMemoryError as error:
        return {"kept": kept, "raised": str(error)}
    return {"kept": kept, "raised": None}


def replays(base: Path) -> dict[str, Any]:
    """Loss and gradient of several passes of one shape, by a graph and without; and by a graph with dropout, twice."""
    model, execution = made(base, 0.0)
    assert execution.cuda_graphs
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    flat = train.flatten(weights)
    graphs = cuda_graphs.Graphs(model, weights, [weight.grad for weight in weights], execution, LONGEST)
    losses, apart = [], []
    for seed in range(5):
        rows = some_rows(seed, range(20, 40))
        flat.grad.zero_()
        by_graph = float(graphs(rows, 100))
        kept = flat.grad.clone()
        flat.grad.zero_()
        plain = loss.summed_loss(model, rows, execution) / 100
        plain.backward()
        losses.append([float(plain.detach()), by_graph])
        del plain  # with it goes what it left on this stream, which no graph may wait for
        apart.append(float((kept - flat.grad).norm() / flat.grad.norm()))
    model, execution = made(base, 0.3)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    train.flatten(weights)
    dropping = cuda_graphs.Graphs(model, weights, [weight.grad for weight in weights], execution, LONGEST)
    again = [float(dropping(rows, 100)) for _ in range(4)]
    return {"recorded": len(graphs._recorded), "losses": losses, "apart": apart, "dropped": again}


def main() -> None:
    """Measure and print."""
    base = Path(sys.argv[1])
    found = {
        "padding": padding(base),
        "replays": replays(base) if torch.cuda.is_available() else None,
        "rooms": rooms(base),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
