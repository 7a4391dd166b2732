"""What people fine-tune with today, as sides of finetune_cuda.py: TRL's SFTTrainer and Unsloth, run by `trainer.train()`.

A side takes the rows and loads its model: `train, model = trl(work)`; `train()` then takes every step of the work, in its
order, and returns how long each took and its loss. The libraries are imported by the sides that use them. Unsloth
patches transformers, trl and peft while it is imported, so it has to come first in a process of its own:
`ready_unsloth()`, before anything else imports them.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune_cuda import Work

SEED = 1
RATE = 2e-4
RANK, ALPHA, DROPOUT = 16, 32, 0.05
MATRICES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Trained:
    """Seconds from the end of one step to the end of the next, and each step's mean loss per trained token (nats)."""

    seconds: tuple[float, ...]
    losses: tuple[float, ...]


Train = Callable[[], Trained]


def trl(it: Work, *, padding_free: bool = False, device: str = "cuda", dropout: float = DROPOUT) -> tuple[Train, Any]:
    """SFTTrainer as its documents show QLoRA: its own loading, checkpointing (non-reentrant), fused loss, Liger's layers.

    Rows are padded to the longest of a step, TRL's default, or laid end to end (padding_free; sdpa with a block mask,
    as there is no flash-attn here). On a CPU: float32, nothing quantized, torch's AdamW, no Liger.
    """
    import torch
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig
    from trl import SFTConfig, SFTTrainer

    gpu = device == "cuda"
    settings = SFTConfig(
        **common(it, gpu=gpu), use_liger_kernel=gpu, padding_free=padding_free,
        model_init_kwargs={"dtype": "bfloat16" if gpu else "float32", "attn_implementation": "sdpa"},
    )  # fmt: skip
    four = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
    )  # fmt: skip
    lora = LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM"
    )  # fmt: skip
    trainer = SFTTrainer(
        str(it.base),
        args=settings,
        train_dataset=dataset(it),
        quantization_config=four if gpu else None,
        peft_config=lora,
    )
    return timed(trainer), trainer.model


def ready_unsloth() -> None:
    """Import Unsloth, which must come before transformers, trl and peft: offline, and its generated code out of the way.

    Its xformers wheel is CUDA 12's and needs that runtime; on a host of CUDA 13 a carried copy is loaded first. Without
    one Unsloth says that xformers can't load, and takes sdpa, a call for every row.
    """
    os.environ |= {
        "UNSLOTH_DISABLE_STATISTICS": "1", "UNSLOTH_MEGA_CACHE": "0", "HF_HUB_OFFLINE": "1",
        "UNSLOTH_COMPILE_LOCATION": tempfile.mkdtemp()
    }  # fmt: skip
    carried = (Path(folder) / "nvidia/cuda_runtime/lib/libcudart.so.12" for folder in sys.path)
    for runtime in (file for file in carried if file.is_file()):
        ctypes.CDLL(str(runtime), mode=ctypes.RTLD_GLOBAL)
    importlib.import_module("unsloth")


def unsloth(it: Work, *, padding_free: bool | None = None, dropout: float = 0.0) -> tuple[Train, Any]:
    """Unsloth as its documents show QLoRA: dropout 0, checkpoints of its own that it moves to the CPU, its own kernels.

    It chooses by itself whether rows are padded, unless padding_free says so. Call ready_unsloth() first.
    """
    from trl import SFTConfig, SFTTrainer
    from unsloth import FastLanguageModel

    base, tokenizer = FastLanguageModel.from_pretrained(
        str(it.base),
        max_seq_length=it.sequence_len,
        load_in_4bit=True,
        local_files_only=True,
        use_exact_model_name=True,
    )
    model = FastLanguageModel.get_peft_model(
        base, r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, target_modules=MATRICES, bias="none",
        use_gradient_checkpointing="unsloth", random_state=SEED,
    )  # fmt: skip
    settings = SFTConfig(**common(it, gpu=True), padding_free=padding_free)
    trainer = SFTTrainer(model, args=settings, train_dataset=dataset(it), processing_class=tokenizer)
    return timed(trainer), trainer.model


def common(it: Work, *, gpu: bool) -> dict[str, Any]:
    """Trainer arguments that both sides share: the step, its order, and no reports."""
    return {
        "output_dir": tempfile.mkdtemp(), "max_steps": len(it.batches), "train_sampling_strategy": "sequential",
        "per_device_train_batch_size": len(it.batches[0]), "gradient_accumulation_steps": 1,
        "max_length": None,
        "learning_rate": RATE, "lr_scheduler_type": "constant", "warmup_steps": 0, "weight_decay": 0.0, "max_grad_norm": 1.0,
        "optim": "paged_adamw_8bit" if gpu else "adamw_torch", "bf16": gpu, "use_cpu": not gpu, "seed": SEED,
        "logging_steps": 1, "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip


def dataset(it: Work) -> Any:
    """The rows of every step, one after the other."""
    from datasets import Dataset

    rows = [it.rows[number] for batch in it.batches for number in batch]
    return Dataset.from_list([{"input_ids": list(row.input_ids), "labels": list(row.labels)} for row in rows])


def timed(trainer: Any) -> Train:
    """`trainer.train()` with a clock."""
    import torch
    from transformers import TrainerCallback

    class Clock(TrainerCallback):  # type: ignore[misc]
        ends: list[float]
        losses: list[float]

        def tick(self) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.ends.append(time.perf_counter())

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.ends, self.losses = [], []
            self.tick()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.tick()

        def on_log(self, *_: Any, logs: dict[str, Any], **__: Any) -> None:
            if "loss" in logs:
                self.losses.append(float(logs["loss"]))

    clock = Clock()
    trainer.add_callback(clock)

    def train() -> Trained:
        trainer.train()
        seconds = tuple(end - start for start, end in zip(clock.ends, clock.ends[1:], strict=False))
        return Trained(seconds, tuple(clock.losses))

    return train
