"""Stage program: what every step of a model's making answers to the same items, greedily, for the loss ledger.

    python -m pipeline.ledger.answers REQUEST.json

Runs in the train environment, all steps in transformers: the base, the adapter on the base as it was trained, both ways
to merge, the quantized model. With one engine a difference between two steps is the model's own; what another engine adds, its kernels
and its batches, is the difference of the last step, the candidate as vLLM serves it, whose answers are in its Evaluation
already. (Base and merged as vLLM serves them are evaluated too, and aren't taken: the adapter would be charged with the
step from one engine to the other.)

Prompts, end tokens and the number of tokens are those of a served chat completion; each step speaks through the
tokenizer and template of its own folder, and no sampling default of the base plays a part. Items are cut into batches
by the length of their prompts, the same whenever they are asked, and a batch is kept as soon as it is done: a killed run
repeats one batch and comes to the same bytes. Payload: STEP.json, a list of id, answer and finish_reason in holdout
order.
"""

from __future__ import annotations

import gc
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline import files, out_of_memory, program
from pipeline.artifacts import Artifact
from pipeline.config.schema import FinetuneConfig
from pipeline.errors import ModelError, Problem
from pipeline.ledger import models
from pipeline.ledger.models import Speaker

BATCH_TOKENS = {"cpu": 8192, "cuda": 65536}
"""Prompts and answers of a batch, padding included: what memory its keys and values take."""
NO_LEDGER = "set evaluate.ledger_items: 0 to go without a ledger"


def run(request: program.Request) -> dict[str, Any]:
    """Ask every step; detail: items, steps, and the seconds that each took in this run.

    Raises ModelError naming the step whose model is broken, ResourceError when one doesn't fit in memory.
    """
    # One token is a thousand small products: threads that spin between them cost a busy machine ten times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch loads, which nothing has done yet
    settings = FinetuneConfig(**request.config["finetune"])
    artifacts = {name: Artifact(**record) for name, record in request.inputs.items()}
    rows = read_rows(artifacts["prepare"].payload / "holdout.jsonl", request.config)
    steps = models.steps(artifacts, settings)
    seconds = {}
    for number, step in enumerate(steps):

        def on_done(done: int, before: int = number * len(rows)) -> None:
            program.progress(before + done, len(steps) * len(rows), "answers")

        started, file = time.monotonic(), request.payload / f"{step}.json"
        if not file.is_file():
            with _step_named(step):
                speaker = models.load(step, artifacts, settings)
                batches = request.folder / "batches" / step
                files.write_json(file, ask(speaker, rows, request.config["max_tokens"], batches, on_done))
            del speaker
            gc.collect()  # before the next one is loaded: two may not fit
        seconds[step] = round(time.monotonic() - started, 1)
    return {"items": len(rows), "steps": list(steps), "seconds": seconds}


def read_rows(holdout: Path, config: dict[str, Any]) -> list[dict[str, Any]]:
    """The first rows of those that the evaluation uses."""
    lines = holdout.read_text(encoding="utf-8").rstrip("\n").split("\n")
    return [json.loads(line) for line in lines[: config["max_items"]][: config["ledger_items"]]]


def ask(
    speaker: Speaker, rows: Sequence[dict[str, Any]], max_tokens: int, kept: Path, on_done: Callable[[int], None]
) -> list[dict[str, str]]:
    """The answers to all rows, in order; those that lie in the folder `kept`, a file a batch, aren't asked for again."""
    prompts = [prompt_ids(speaker, row["messages"][:-1]) for row in rows]
    batches = cut([len(prompt) for prompt in prompts], max_tokens, BATCH_TOKENS[speaker.model.device.type])
    kept.mkdir(parents=True, exist_ok=True)
    found: dict[int, dict[str, str]] = {}
    for number, batch in enumerate(batches):
        file = kept / f"{number}.json"
        if not file.is_file():
            files.write_json(file, generate(speaker, [prompts[at] for at in batch], max_tokens))
        said = json.loads(file.read_text(encoding="utf-8"))
        found |= {at: {"id": rows[at]["id"], **answer} for at, answer in zip(batch, said, strict=True)}
        on_done(len(found))
    return [found[at] for at in range(len(rows))]


def prompt_ids(speaker: Speaker, messages: Sequence[dict[str, str]]) -> list[int]:
    """The prompt as a server renders it: the chat template alone puts special tokens in."""
    text = speaker.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids: list[int] = speaker.tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def cut(lengths: Sequence[int], max_tokens: int, budget: int) -> list[list[int]]:
    """Places in `lengths`, the shortest first, in batches of at most `budget` tokens with padding and answers."""
    batches: list[list[int]] = []
    for at in sorted(range(len(lengths)), key=lambda at: (lengths[at], at)):
        if not batches or (len(batches[-1]) + 1) * (lengths[at] + max_tokens) > budget:
            batches.append([])
        batches[-1].append(at)
    return batches


def generate(speaker: Speaker, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[dict[str, str]]:
    """Greedy answers to a batch of prompts: padded on the left, behind a mask, so that a prompt sees none of it."""
    import torch
    from transformers import GenerationConfig

    longest, pad = max(map(len, prompts)), speaker.end_tokens[0]
    ids = torch.tensor([[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    plain = GenerationConfig(
        do_sample=False, max_new_tokens=max_tokens, eos_token_id=list(speaker.end_tokens), pad_token_id=pad
    )
    speaker.model.generation_config = plain  # else generate() fills in what the base's own asks for
    device = speaker.model.device
    with torch.inference_mode():
        out = speaker.model.generate(ids.to(device), attention_mask=mask.to(device), generation_config=plain)
    return [_answer(speaker, row) for row in out[:, longest:].tolist()]


def _answer(speaker: Speaker, ids: list[int]) -> dict[str, str]:
    """What a client is sent: the text up to the end token, without special tokens."""
    end = next((at for at, token in enumerate(ids) if token in speaker.end_tokens), None)
    text = speaker.tokenizer.decode(ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return {"answer": text, "finish_reason": "length" if end is None else "stop"}


@contextmanager
def _step_named(step: str) -> Iterator[None]:
    """Say at which step a model is broken, or too large."""
    with out_of_memory.named(f"the ledger's step {step}", "evaluate.ledger_items", NO_LEDGER):
        try:
            yield
        except ModelError as error:
            broken = Problem(f"the ledger stops at the step {step}: its model is broken", remedy="see below")
            raise ModelError([broken, *error.problems]) from error


if __name__ == "__main__":
    program.main(run)
