"""Stage finetune: QLoRA on the prepared rows, with checkpoints and exact resume.

    python -m pipeline.finetune.train REQUEST.json

Payload: peft's adapter_model.safetensors and adapter_config.json. The loss of an effective batch
(micro_batch_size times gradient_accumulation_steps bins or rows) is the mean over all its trained tokens,
however it is cut into passes through the model. Every step seeds its own random numbers, so a run that is
killed and started again ends with the same bytes as one that wasn't, on the same machine, thread count
and packages (proved on a CPU; CUDA kernels don't promise it). On one device, or on several of one host:
finetune_distributed says what they share.
"""

from __future__ import annotations

import ctypes
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import files, out_of_memory, program
from pipeline.artifacts import Artifact
from pipeline.config.schema import FinetuneConfig
from pipeline.errors import StageFailed
from pipeline.files import write_lines
from pipeline.finetune import checkpoints as finetune_checkpoints
from pipeline.finetune import cuda_graphs, flat, fsdp, fused_lora, launch, packing, plots
from pipeline.finetune import loss as finetune_loss
from pipeline.finetune import model as finetune_model
from pipeline.finetune import rows as finetune_rows
from pipeline.finetune.checkpoints import Best, State
from pipeline.finetune.distributed import Group
from pipeline.finetune.packing import Row

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
    """Train an adapter with the others of the group, the first of which writes the files.

    Detail: steps, tokens, losses, tokens/s, hardware, rows left out. `train_loss` is the mean of the last tenth of the
    logged steps, `eval_loss` that of the adapter that is kept, `effective_batch_size` the bins or rows of a step of all
    processes together.
    """
    settings = FinetuneConfig(**request.config["finetune"])
    sequence_len, seed = request.config["sequence_len"], request.config["seed"]
    base, prepared = (Artifact(**request.inputs[name]) for name in ("base", "prepare"))
    extra = request.folder / "extra" if group.rank == 0 else None
    rows = finetune_rows.read(base.payload, prepared.payload, extra, settings, sequence_len)
    keep_freed_memory()
    with _out_of_memory_named(settings):
        checkpoints = request.folder / "checkpoints"
        before = _begun_with(checkpoints)
        _tell_how_rows_are_shared(settings)
        model, hardware = finetune_model.load(base.payload, settings, sequence_len, before)
        if group.rank == 0:
            files.write_json(checkpoints / HARDWARE, asdict(hardware))
        model = finetune_model.with_lora(model, settings, hardware, base.digest, seed)
        if hardware.split:
            fsdp.split(model, hardware.device, group.size)
        training = Training(
            model, hardware, settings, rows,
            sequence_len=sequence_len, seed=seed, checkpoints=checkpoints, group=group,
        )  # fmt: skip
        done = training.run()
    best = done.best.step if done.best else None
    if extra:
        finetune_model.save_adapter(model, training.best_weights(), request.payload)
        write_lines(extra / "history.jsonl", done.history)
        plots.draw(extra / "loss.png", done.history, best)
    losses = [entry["train_loss"] for entry in done.history if "train_loss" in entry]
    last = losses[-max(1, len(losses) // 10) :]
    return {
        "steps": done.step,
        "rows": len(rows.train),
        "tokens": done.tokens,
        "effective_batch_size": settings.micro_batch_size * settings.gradient_accumulation_steps,
        "truncated_rows": rows.truncated,
        "rows_without_answer": rows.without_answer,
        "train_loss": sum(last) / len(last),
        "eval_loss": done.best.loss if done.best else None,
        "best_step": best,
        "tokens_per_second": training.tokens_per_second,
        "hardware": asdict(replace(hardware, cuda_graphs=training.used_graphs)),
    }


def _begun_with(checkpoints: Path) -> finetune_model.Hardware | None:
    """How the run that left these checkpoints was run; None for a new run."""
    if not finetune_checkpoints.newest_state(checkpoints).step:
        checkpoints.mkdir(parents=True, exist_ok=True)
        return None
    return finetune_model.Hardware(**json.loads((checkpoints / HARDWARE).read_text(encoding="utf-8")))


def _tell_how_rows_are_shared(settings: FinetuneConfig) -> None:
    """What a person used to a batch that grows with the processes should know."""
    processes, batch = settings.num_processes, settings.micro_batch_size * settings.gradient_accumulation_steps
    what = "bins" if settings.sample_packing else "rows"
    if processes > 1:
        program.message(
            f"{processes} processes share the {batch} {what} of each step: the batch is that of one process"
        )


class Training:
    """A training run: what it trains on, and where it stands."""

    def __init__(
        self,
        model: Any,
        hardware: finetune_model.Hardware,
        settings: FinetuneConfig,
        rows: finetune_rows.Rows,
        *,
        sequence_len: int,
        seed: int,
        checkpoints: Path,
        group: Group | None = None,
    ) -> None:
        self.group = group or Group()
        self.model, self.hardware, self.settings = model, hardware, settings
        self.rows, self.seed, self.checkpoints = rows, seed, checkpoints
        self.weights = {name: it for name, it in model.named_parameters() if it.requires_grad}
        self.flat = flat.flatten(list(self.weights.values()))
        self.optimizer = make_optimizer([self.flat], settings)
        self.backward = self._backward
        if hardware.cuda_graphs:
            weights = list(self.weights.values())
            gradients = [weight.grad for weight in weights]
            self.backward = cuda_graphs.Graphs(model, weights, gradients, hardware, sequence_len)
        self.lengths = [len(row.input_ids) for row in rows.train]
        self.capacity = sequence_len if settings.sample_packing else None
        self.total = self._count_steps()
        self.rate = learning_rate(self.optimizer, settings, self.total)
        self.tokens_per_second = 0.0

    def run(self) -> State:
        """Train to the last step, from the newest checkpoint if there is one.

        Raises StageFailed when the loss is no longer a number.
        """
        from peft.helpers import disable_input_dtype_casting

        state = finetune_checkpoints.resume(self.checkpoints, self.weights, self.optimizer)
        if state.step:
            program.message(f"going on from the checkpoint of step {state.step} of {self.total}")
        began, before = time.monotonic(), state.tokens
        with disable_input_dtype_casting(self.model):  # autocast casts what has to be cast
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
        """The adapter to keep: of the lowest validation loss if that is asked for, else the last."""
        best = finetune_checkpoints.newest_state(self.checkpoints).best
        return finetune_checkpoints.load_best(self.checkpoints, best) if best else self.weights

    def _count_steps(self) -> int:
        if self.settings.max_steps:
            return self.settings.max_steps
        whole, part = divmod(self.settings.num_epochs, 1)
        epochs = [len(self._epoch(epoch)) for epoch in range(int(whole))]
        return max(1, sum(epochs) + (math.ceil(part * len(self._epoch(int(whole)))) if part else 0))

    def _epoch(self, epoch: int) -> list[list[int]]:
        batch = self.settings.micro_batch_size * self.settings.gradient_accumulation_steps
        return packing.steps_of_epoch(self.lengths, seed=self.seed, epoch=epoch, batch=batch, capacity=self.capacity)

    def _steps_from(self, done: int) -> Iterator[list[int]]:
        """The rows of each step that is still to do."""
        step = 0
        for epoch in count():
            for rows in self._epoch(epoch):
                if step == self.total:
                    return
                step += 1
                if step > done:
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
        trained = sum(row.trained for row in rows)
        loss = torch.zeros((), device=self.hardware.device)
        mine, idle = self._shared(rows)
        for some in mine:
            loss += self.backward(some, trained)
        for some in idle:
            (0.0 * finetune_loss.summed_loss(self.model, some, self.hardware)).backward()
        self.group.add_up([self.flat.grad, loss])
        norm = torch.nn.utils.clip_grad_norm_([self.flat], self.settings.max_grad_norm)
        state.step += 1
        state.tokens += sum(len(row.input_ids) for row in rows)
        every = (self.settings.logging_steps, self.settings.save_steps, self.settings.eval_steps)
        if any(self._due(state, steps) for steps in every):  # reading the loss waits for the GPU
            rate = self.rate(state.step - 1)
            entry = {"train_loss": float(loss), "learning_rate": rate, "grad_norm": float(norm)}
            self._must_be_finite(state, entry)
            if self._due(state, self.settings.logging_steps):
                state.history.append({"step": state.step, **entry})
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)

    def _backward(self, rows: Sequence[Row], trained: int) -> torch.Tensor:
        """Add the gradient of the rows' loss summed, over `trained`; returns that loss."""
        fused_lora.draw(self.model)
        loss = finetune_loss.summed_loss(self.model, rows, self.hardware) / trained
        loss.backward()
        return loss.detach()

    def _passes(self, rows: Sequence[Row]) -> list[list[Row]]:
        most = None if self.settings.sample_packing else self.settings.micro_batch_size
        return finetune_loss.passes(rows, self.hardware, most)

    def _shared(self, rows: Sequence[Row]) -> tuple[list[list[Row]], list[list[Row]]]:
        """This process's passes over its part of the rows, and passes that count for nothing.

        Those are for a base that is split, while others with more passes still need this process's part of it.
        """
        mine = self._passes(self.group.share(rows))
        if not self.hardware.split:
            return mine, []
        missing = self.group.most(len(mine), self.hardware.device) - len(mine)
        return mine, [[min(rows, key=lambda row: len(row.input_ids))]] * missing

    def _must_be_finite(self, state: State, entry: dict[str, float]) -> None:
        if math.isfinite(entry["train_loss"]) and math.isfinite(entry["grad_norm"]):
            return
        raise StageFailed(
            f"step {state.step}: the loss is {entry['train_loss']} and its gradient {entry['grad_norm']}",
            key="finetune.learning_rate",
            remedy=f"lower finetune.learning_rate (it was {self.settings.learning_rate:g}) or raise"
            f" finetune.warmup_ratio (it was {self.settings.warmup_ratio:g}), and run the same command again",
        )

    def _report(self, state: State) -> None:
        if not self._due(state, self.settings.logging_steps):
            return
        entry = {name: value for name, value in state.history[-1].items() if name != "step"}
        entry["tokens_per_second"] = self.tokens_per_second
        for name, value in entry.items():
            program.metric(name, value, state.step)
        shown = {"loss": entry["train_loss"], "lr": entry["learning_rate"]}
        program.progress(state.step, self.total, "steps", **shown, **{"tokens/s": self.tokens_per_second})

    def _evaluate(self, state: State) -> None:
        """Validation loss; the adapter is kept when it is the best so far."""
        rows = self.rows.validation
        mine, idle = self._shared(rows)
        trained = sum(row.trained for some in mine for row in some)
        total = finetune_loss.mean_loss(self.model, mine, self.hardware) * trained if mine else 0.0
        if idle:
            finetune_loss.mean_loss(self.model, idle, self.hardware)
        loss = self.group.total(total, self.hardware.device) / sum(row.trained for row in rows)
        state.history.append({"step": state.step, "eval_loss": loss})
        program.metric("eval_loss", loss, state.step)
        if self.settings.load_best_model_at_end and (state.best is None or loss < state.best.loss):
            state.best = Best(state.step, loss)
            if self.group.rank == 0:
                finetune_checkpoints.save_best(self.checkpoints, state.step, self.weights)

    def _save(self, state: State) -> None:
        self.group.must_agree(self.weights, state.step)
        if self.group.rank == 0:
            finetune_checkpoints.save(self.checkpoints, state, self.weights, self.optimizer)


def make_optimizer(weights: list[torch.Tensor], settings: FinetuneConfig) -> torch.optim.Optimizer:
    """The optimizer of that name in transformers' TrainingArguments."""
    import torch

    chosen: dict[str, Any] = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
    if settings.optimizer in ("adamw_torch", "adamw_torch_fused"):
        return torch.optim.AdamW(weights, **chosen, fused=settings.optimizer == "adamw_torch_fused")
    import bitsandbytes

    made: torch.optim.Optimizer = bitsandbytes.optim.AdamW(
        weights, **chosen, optim_bits=8, is_paged=settings.optimizer == "paged_adamw_8bit"
    )
    return made


def learning_rate(optimizer: torch.optim.Optimizer, settings: FinetuneConfig, total: int) -> Any:
    """Step (from 0) → learning rate, by transformers' scheduler of that name; depends on the step alone."""
    from transformers import get_scheduler

    warmup = math.ceil(settings.warmup_ratio * total)
    schedule = get_scheduler(settings.lr_scheduler, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    factor = schedule.lr_lambdas[0]
    return lambda step: settings.learning_rate * factor(step)


def keep_freed_memory() -> None:
    """Tell glibc to reuse big blocks instead of giving them back: zeroing their pages anew costs time."""
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
            mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def _out_of_memory_named(settings: FinetuneConfig) -> AbstractContextManager[None]:
    return out_of_memory.named("training", "finetune.micro_batch_size", _smaller(settings))


def _smaller(settings: FinetuneConfig) -> str:
    """The settings to change when memory doesn't suffice."""
    also = "" if settings.gradient_checkpointing is True else ", or set finetune.gradient_checkpointing: true"
    if settings.fsdp_version is None:
        more = "" if settings.num_processes > 1 else "more finetune.num_processes and "
        also += f", or, with several GPUs, set {more}finetune.fsdp_version: 2 (the base is split over them)"
    if settings.micro_batch_size == 1:
        return "lower data.sequence_len" + also
    batch = settings.micro_batch_size * settings.gradient_accumulation_steps
    micro = max(size for size in range(1, settings.micro_batch_size // 2 + 1) if batch % size == 0)
    return (
        f"set finetune.micro_batch_size: {micro} and finetune.gradient_accumulation_steps:"
        f" {batch // micro} (the same effective batch){also}"
    )


if __name__ == "__main__":
    program.main(run)
