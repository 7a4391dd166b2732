"""Stage finetune: an adapter trained on the prepared rows, with checkpoints and exact resume.

    python -m pipeline.finetune.train REQUEST.json

Payload: peft's adapter_model.safetensors and adapter_config.json. An objective (finetune/objectives.py) says which rows are read
and which loss is lowered. An effective batch is micro_batch_size · gradient_accumulation_steps bins or rows; its loss is the sum
over its rows, divided by the sum of their `trained`, however it is cut into passes.

Every step seeds its own random numbers. A run that is killed and started again ends with the bytes of an uninterrupted one, on the
same machine, thread count and packages: proved on a CPU; CUDA kernels don't promise it. Several devices of one host share a run as
finetune/distributed.py says.
"""

from __future__ import annotations

import ctypes
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import files, out_of_memory, program
from pipeline.artifacts import Artifact
from pipeline.config.schema import FinetuneConfig
from pipeline.errors import StageFailed
from pipeline.files import write_lines
from pipeline.finetune import checkpoints, cuda_graphs, fsdp, fused_lora, launch, memory, packing, plots
from pipeline.finetune import model as finetune_model
from pipeline.finetune.checkpoints import Best, State
from pipeline.finetune.distributed import Group
from pipeline.finetune.execution import Execution
from pipeline.finetune.objectives import OBJECTIVES
from pipeline.finetune.packing import Row
from pipeline.finetune.rows import Rows

if TYPE_CHECKING:
    import torch

SHOWN_WITH = ("pipeline.finetune.plots",)
HARDWARE = "hardware.json"
STEP_SEED, PROCESS_SEED = 1_000_003, 1_000_000_007


def run(request: program.Request) -> dict[str, Any]:
    """Train an adapter, in this process or in as many as the config names; detail: as `train` has it."""
    processes = FinetuneConfig(**request.config["finetune"]).num_processes
    return train(request, Group()) if processes == 1 else launch.launch(request, processes)


def train(request: program.Request, group: Group) -> dict[str, Any]:
    """Train an adapter with the other processes of the group; the first of them writes the files.

    Detail: steps, tokens, losses, tokens/s, hardware, rows left out. The training loss is the mean of the last tenth of the logged
    steps, the validation loss that of the adapter in the payload. `effective_batch_size` counts bins or rows of all processes.
    """
    settings = FinetuneConfig(**request.config["finetune"])
    objective = OBJECTIVES[settings.objective]
    sequence_len, seed = request.config["sequence_len"], request.config["seed"]
    base, splits = (Artifact(**request.inputs[name]) for name in ("base", "prepare"))
    extra = request.folder / "extra" if group.rank == 0 else None
    rows = objective.rows_module().read(base.payload, splits.payload, extra, settings, sequence_len)
    keep_freed_memory()
    with out_of_memory.named("training", "finetune.micro_batch_size", memory.smaller(settings)):
        folder = request.folder / "checkpoints"
        before = _execution_before(folder)
        _tell_how_rows_are_shared(settings)
        model, execution = finetune_model.load(base.payload, settings, sequence_len, before)
        if group.rank == 0:
            files.write_json(folder / HARDWARE, asdict(execution))
        model = finetune_model.with_lora(model, settings, execution, base.digest, seed)
        if execution.split:
            fsdp.split(model, execution.device, group.size)
        training = Training(
            model, execution, settings, rows, sequence_len=sequence_len, seed=seed, folder=folder, group=group
        )
        state = training.run()
    best = state.best.step if state.best else None
    if extra:
        finetune_model.save_adapter(model, training.best_weights(), request.payload)
        write_lines(extra / "history.jsonl", state.history)
        plots.draw(extra / "loss.png", state.history, best, objective)
    losses = [entry[objective.train_metric] for entry in state.history if objective.train_metric in entry]
    last = losses[-max(1, len(losses) // 10) :]
    return {
        "steps": state.step,
        "rows": len(rows.train),
        "tokens": state.tokens,
        "effective_batch_size": settings.micro_batch_size * settings.gradient_accumulation_steps,
        "truncated_rows": rows.cut,
        "rows_without_answer": rows.without_answer,
        objective.train_metric: sum(last) / len(last),
        objective.eval_metric: state.best.loss if state.best else None,
        "best_step": best,
        "tokens_per_second": training.tokens_per_second,
        "hardware": asdict(replace(execution, cuda_graphs=training.used_graphs)),
    }


def _execution_before(folder: Path) -> Execution | None:
    """How the run was run that left these checkpoints; None for a new run."""
    if not checkpoints.newest_state(folder).step:
        folder.mkdir(parents=True, exist_ok=True)
        return None
    return Execution(**json.loads((folder / HARDWARE).read_text(encoding="utf-8")))


def _tell_how_rows_are_shared(settings: FinetuneConfig) -> None:
    """Say that the batch doesn't grow with the processes: other trainers' does."""
    processes, batch = settings.num_processes, settings.micro_batch_size * settings.gradient_accumulation_steps
    unit = "bins" if settings.sample_packing else "rows"
    if processes > 1:
        program.message(
            f"{processes} processes share the {batch} {unit} of each step: the batch is that of one process"
        )


class Training:
    """A training run: model, rows, optimizer, and the steps from its newest checkpoint to its last."""

    def __init__(
        self,
        model: Any,
        execution: Execution,
        settings: FinetuneConfig,
        rows: Rows,
        *,
        sequence_len: int,
        seed: int,
        folder: Path,
        group: Group | None = None,
    ) -> None:
        self.group = group or Group()
        self.model, self.execution, self.settings = model, execution, settings
        self.rows, self.seed, self.folder = rows, seed, folder
        self.objective = OBJECTIVES[settings.objective]
        self.loss = self.objective.loss_module()
        self.weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self.flat = flatten(list(self.weights.values()))
        self.optimizer = make_optimizer([self.flat], settings)
        self.backward = self._backward
        if execution.cuda_graphs:
            weights = list(self.weights.values())
            gradients = [weight.grad for weight in weights]
            self.backward = cuda_graphs.Graphs(model, weights, gradients, execution, sequence_len)
        self.lengths = [row.length for row in rows.train]
        self.capacity = sequence_len if settings.sample_packing else None
        self.total = self._count_steps()
        self.rate = learning_rate(self.optimizer, settings, self.total)
        self.tokens_per_second = 0.0

    def run(self) -> State:
        """Train to the last step, from the newest checkpoint if there is one; raises StageFailed when the loss isn't finite."""
        from peft.helpers import disable_input_dtype_casting

        state = checkpoints.resume(self.folder, self.weights, self.optimizer)
        if state.step:
            program.message(f"going on from the checkpoint of step {state.step} of {self.total}")
        began, before = time.monotonic(), state.tokens
        with disable_input_dtype_casting(self.model):  # autocast casts where a product needs it
            for rows in self._steps_from(state.step):
                self.step(state, rows)
                self.tokens_per_second = (state.tokens - before) / (time.monotonic() - began)
                self._report(state)
                if self.rows.validation and self._due(state, self.settings.eval_steps):
                    self._evaluate(state)
                if self._due(state, self.settings.save_steps):
                    self._save(state)
        return state

    @property
    def used_graphs(self) -> bool:
        """Whether passes ran as CUDA graphs to the end."""
        return isinstance(self.backward, cuda_graphs.Graphs) and self.backward.works

    def best_weights(self) -> dict[str, torch.Tensor]:
        """The adapter for the payload: of the lowest validation loss where load_best_model_at_end is on, else the last."""
        best = checkpoints.newest_state(self.folder).best
        return checkpoints.load_best(self.folder, best) if best else self.weights

    def _count_steps(self) -> int:
        if self.settings.max_steps:
            return self.settings.max_steps
        whole, part = divmod(self.settings.num_epochs, 1)
        epochs = [len(self._epoch(epoch)) for epoch in range(int(whole))]
        return max(1, sum(epochs) + (math.ceil(part * len(self._epoch(int(whole)))) if part else 0))

    def _epoch(self, epoch: int) -> list[list[int]]:
        batch = self.settings.micro_batch_size * self.settings.gradient_accumulation_steps
        return packing.steps_of_epoch(self.lengths, seed=self.seed, epoch=epoch, batch=batch, capacity=self.capacity)

    def _steps_from(self, first: int) -> Iterator[list[int]]:
        """The rows of each step after the first so many."""
        step = 0
        for epoch in count():
            for rows in self._epoch(epoch):
                if step == self.total:
                    return
                step += 1
                if step > first:
                    yield rows

    def _due(self, state: State, every: int) -> bool:
        return state.step % every == 0 or state.step == self.total

    def step(self, state: State, numbers: Sequence[int]) -> None:
        """One optimizer step over the training rows of these numbers."""
        import torch

        torch.manual_seed(self.seed * STEP_SEED + state.step + self.group.rank * PROCESS_SEED)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(state.step)
        rows = [self.rows.train[number] for number in numbers]
        divisor = sum(row.trained for row in rows)
        loss = torch.zeros((), device=self.execution.device)
        own, idle = self._shared(rows)
        for part in own:
            loss += self.backward(part, divisor)
        for part in idle:
            (0.0 * self.loss.summed_loss(self.model, part, self.execution)).backward()
        self.group.add_up([self.flat.grad, loss])
        norm = torch.nn.utils.clip_grad_norm_([self.flat], self.settings.max_grad_norm)
        state.step += 1
        state.tokens += sum(row.length for row in rows)
        every = (self.settings.logging_steps, self.settings.save_steps, self.settings.eval_steps)
        if any(self._due(state, steps) for steps in every):  # reading the loss waits for the GPU
            rate = self.rate(state.step - 1)
            entry = {self.objective.train_metric: float(loss), "learning_rate": rate, "grad_norm": float(norm)}
            self._must_be_finite(state, float(loss), float(norm))
            if self._due(state, self.settings.logging_steps):
                state.history.append({"step": state.step, **entry})
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)

    def _backward(self, rows: Sequence[Row], divisor: int) -> torch.Tensor:
        """Add the gradient of the rows' summed loss / divisor; returns that loss."""
        fused_lora.draw(self.model)
        loss = self.loss.summed_loss(self.model, rows, self.execution) / divisor
        loss.backward()
        return loss.detach()

    def _passes(self, rows: Sequence[Row]) -> list[list[Row]]:
        most = None if self.settings.sample_packing else self.settings.micro_batch_size
        return self.loss.passes(rows, self.execution, most)

    def _shared(self, rows: Sequence[Row]) -> tuple[list[list[Row]], list[list[Row]]]:
        """This process's passes over its part of the rows, and idle ones that count for nothing.

        Idle passes serve a split base: processes with more passes still need this one's part of it.
        """
        own = self._passes(self.group.share(rows))
        if not self.execution.split:
            return own, []
        missing = self.group.most(len(own), self.execution.device) - len(own)
        return own, [[min(rows, key=lambda row: row.length)]] * missing

    def _must_be_finite(self, state: State, loss: float, norm: float) -> None:
        if math.isfinite(loss) and math.isfinite(norm):
            return
        raise StageFailed(
            f"step {state.step}: the loss is {loss} and its gradient {norm}",
            key="finetune.learning_rate",
            remedy=f"lower finetune.learning_rate (it was {self.settings.learning_rate:g}) or raise"
            f" finetune.warmup_ratio (it was {self.settings.warmup_ratio:g}), and run the same command again",
        )

    def _report(self, state: State) -> None:
        if not self._due(state, self.settings.logging_steps):
            return
        entry = {name: number for name, number in state.history[-1].items() if name != "step"}
        entry["tokens_per_second"] = self.tokens_per_second
        for name, number in entry.items():
            program.metric(name, number, state.step)
        figures = {"loss": entry[self.objective.train_metric], "lr": entry["learning_rate"]}
        program.progress(state.step, self.total, "steps", **figures, **{"tokens/s": self.tokens_per_second})

    def _evaluate(self, state: State) -> None:
        """Take the validation loss; save the adapter when it is the lowest so far."""
        rows = self.rows.validation
        own, idle = self._shared(rows)
        divisor = sum(row.trained for part in own for row in part)
        total = self.loss.mean_loss(self.model, own, self.execution) * divisor if own else 0.0
        if idle:
            self.loss.mean_loss(self.model, idle, self.execution)
        loss = self.group.total(total, self.execution.device) / sum(row.trained for row in rows)
        state.history.append({"step": state.step, self.objective.eval_metric: loss})
        program.metric(self.objective.eval_metric, loss, state.step)
        if self.settings.load_best_model_at_end and (state.best is None or loss < state.best.loss):
            state.best = Best(state.step, loss)
            if self.group.rank == 0:
                checkpoints.save_best(self.folder, state.step, self.weights)

    def _save(self, state: State) -> None:
        self.group.must_agree(self.weights, state.step)
        if self.group.rank == 0:
            checkpoints.save(self.folder, state, self.weights, self.optimizer)


def flatten(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """One parameter of all weights behind each other: an optimizer step is a few kernels then; (elements,).

    The weights have one dtype and one device. Each weight and its gradient become views of the parameter and of its gradient, which
    starts as zero.
    """
    import torch

    with torch.no_grad():
        flat = torch.nn.Parameter(torch.cat([weight.detach().flatten() for weight in weights]))
    flat.grad = torch.zeros_like(flat)
    sizes = [weight.numel() for weight in weights]
    for weight, part, gradient in zip(weights, flat.data.split(sizes), flat.grad.split(sizes), strict=True):
        weight.data = part.view(weight.shape)
        weight.grad = gradient.view(weight.shape)
    return flat


def make_optimizer(weights: list[torch.Tensor], settings: FinetuneConfig) -> torch.optim.Optimizer:
    """The optimizer of that name in transformers' TrainingArguments."""
    import torch

    rates: dict[str, Any] = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
    if settings.optimizer in ("adamw_torch", "adamw_torch_fused"):
        return torch.optim.AdamW(weights, **rates, fused=settings.optimizer == "adamw_torch_fused")
    import bitsandbytes

    optimizer: torch.optim.Optimizer = bitsandbytes.optim.AdamW(
        weights, **rates, optim_bits=8, is_paged=settings.optimizer == "paged_adamw_8bit"
    )
    return optimizer


def learning_rate(optimizer: torch.optim.Optimizer, settings: FinetuneConfig, total: int) -> Any:
    """Step (from 0) → learning rate, by transformers' scheduler of that name; depends on the step alone."""
    from transformers import get_scheduler

    warmup = math.ceil(settings.warmup_ratio * total)
    schedule = get_scheduler(settings.lr_scheduler, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    factor = schedule.lr_lambdas[0]
    return lambda step: settings.learning_rate * factor(step)


def keep_freed_memory() -> None:
    """Tell glibc to reuse big blocks instead of returning them: zeroing their pages again costs time."""
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
            mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


if __name__ == "__main__":
    program.main(run)
