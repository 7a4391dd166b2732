"""Checkpoints of a training run: folders step-N, complete or not there, and best-N with the best adapter.

A checkpoint holds the adapter and the optimizer's state (safetensors), and the run's State (JSON). Random numbers need no place in
it: each step seeds its own. Nothing is pickled. Checkpoints survive `kill -9`; a power cut may cost the newest one.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

KEPT = 2


@dataclass(frozen=True)
class Best:
    """The lowest validation loss so far and the step that had it."""

    step: int
    loss: float


@dataclass
class State:
    """A run's progress; `history` has an entry for each logged or evaluated step."""

    step: int = 0
    tokens: int = 0
    best: Best | None = None
    history: list[dict[str, float]] = field(default_factory=list)


def save(folder: Path, state: State, weights: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Write checkpoint step-N beside, rename it, and drop all but the newest KEPT and the best."""
    partial = _fresh(folder, f"step-{state.step}")
    tensors, numbers = _state_of(optimizer)
    _write(partial / "adapter.safetensors", weights)
    _write(partial / "optimizer.safetensors", tensors)
    (partial / "state.json").write_text(json.dumps({**asdict(state), "optimizer": numbers}), encoding="utf-8")
    _rename(partial, folder / f"step-{state.step}")
    for step in _steps(folder, "step")[:-KEPT]:
        shutil.rmtree(folder / f"step-{step}")
    for step in _steps(folder, "best"):
        if state.best is None or step != state.best.step:
            shutil.rmtree(folder / f"best-{step}")


def save_best(folder: Path, step: int, weights: dict[str, torch.Tensor]) -> None:
    """Write the adapter with the lowest validation loss so far."""
    partial = _fresh(folder, f"best-{step}")
    _write(partial / "adapter.safetensors", weights)
    _rename(partial, folder / f"best-{step}")


def load_best(folder: Path, best: Best) -> dict[str, torch.Tensor]:
    """The adapter that `save_best` wrote."""
    from safetensors.torch import load_file

    weights: dict[str, torch.Tensor] = load_file(folder / f"best-{best.step}" / "adapter.safetensors")
    return weights


def newest_state(folder: Path) -> State:
    """The newest checkpoint's state; a new State when there is none."""
    steps = _steps(folder, "step")
    return _read_state(folder / f"step-{steps[-1]}")[0] if steps else State()


def _read_state(checkpoint: Path) -> tuple[State, dict[str, dict[str, Any]]]:
    """A checkpoint's state, and the optimizer's plain numbers by the parameter's place."""
    raw = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    numbers = raw.pop("optimizer")
    return State(**{**raw, "best": Best(**raw["best"]) if raw["best"] else None}), numbers


def resume(folder: Path, weights: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer) -> State:
    """Go on from the newest checkpoint: fill `weights` and the optimizer; a new State when there is none."""
    import torch
    from safetensors.torch import load_file

    for partial in folder.glob(".*.partial"):
        shutil.rmtree(partial, ignore_errors=True)  # another process of this run may remove it, too
    steps = _steps(folder, "step")
    if not steps:
        return State()
    checkpoint = folder / f"step-{steps[-1]}"
    with torch.no_grad():
        for name, tensor in load_file(checkpoint / "adapter.safetensors").items():
            weights[name].copy_(tensor)
    state, numbers = _read_state(checkpoint)
    entries: dict[int, dict[str, Any]] = {int(place): dict(entry) for place, entry in numbers.items()}
    for key, tensor in load_file(checkpoint / "optimizer.safetensors").items():
        place, _, part = key.partition("/")
        entries.setdefault(int(place), {})[part] = tensor
    optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})
    return state


def _state_of(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, Any]]]:
    """The optimizer's tensors by "place of the parameter/part", and its plain numbers by the place."""
    import torch

    # not its state_dict: bitsandbytes' puts the tensors of 8-bit states into a dictionary of their own
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    tensors, numbers = {}, {}
    for place, entry in enumerate(optimizer.state[weight] for weight in weights):
        tensors.update({f"{place}/{part}": state for part, state in entry.items() if isinstance(state, torch.Tensor)})
        numbers[str(place)] = {part: state for part, state in entry.items() if not isinstance(state, torch.Tensor)}
    return tensors, numbers


def _write(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    from safetensors.torch import save_file

    # Clones, because optimizers may hold several tensors in one storage, which safetensors refuses.
    save_file({name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}, file)


def _fresh(folder: Path, name: str) -> Path:
    partial = folder / f".{name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def _rename(partial: Path, final: Path) -> None:
    """Put a folder in place; a resumed run may write one a second time, with the same bytes."""
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)


def _steps(folder: Path, kind: str) -> list[int]:
    matches = (re.fullmatch(rf"{kind}-(\d+)", path.name) for path in folder.glob(f"{kind}-*"))
    return sorted(int(match[1]) for match in matches if match)
