"""Stage program: every step of a model's making answers the same items, greedily, for the loss ledger.

    python -m pipeline.ledger.answers REQUEST.json

Runs in the train environment. All steps run in transformers: the base, the adapter on the base in training's precision, both ways to
merge, the quantized model. With one engine a difference between two steps is the model's own. The last step (vLLM) also shows what
changing the engine costs: its answers are in the candidate's Evaluation already. Base and merged model as vLLM serves them are
evaluated too, but aren't taken: the adapter would be charged with the change of engine.

- Prompts, end tokens and the number of tokens are those of a served chat completion.
- Each step speaks through the tokenizer and template of its own folder; the base's sampling defaults play no part.
- Items are cut into batches by the length of their prompts, always alike. A batch is written once it is complete: a killed run
  repeats one batch and ends with the same bytes.

Payload: STEP.json, a list of id, answer and finish_reason in holdout order.
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
"""Prompts and answers of a batch, padding included: they bound the memory of its keys and values."""
NO_LEDGER = "set evaluate.ledger_items: 0 to go without a ledger"


def run(request: program.Request) -> dict[str, Any]:
    """Ask every step; detail: items, steps, and the seconds of each in this run.

    Raises ModelError naming the step whose model is broken, ResourceError when a model doesn't fit in memory.
    """
    # One token is a thousand small products: threads that spin between them cost a busy machine ten times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch loads, which nothing has done yet
    settings = FinetuneConfig(**request.config["finetune"])
    artifacts = {name: Artifact(**record) for name, record in request.inputs.items()}
    rows = read_rows(artifacts["prepare"].payload / "holdout.jsonl", request.config)
    steps = models.steps(artifacts, settings)
    seconds = {}
    for number, step in enumerate(steps):

        def on_done(count: int, before: int = number * len(rows)) -> None:
            program.progress(before + count, len(steps) * len(rows), "answers")

        start, file = time.monotonic(), request.payload / f"{step}.json"
        if not file.is_file():
            with _step_named(step):
                speaker = models.load(step, artifacts, settings)
                batches = request.folder / "batches" / step
                files.write_json(file, ask(speaker, rows, request.config["max_tokens"], batches, on_done))
            del speaker
            gc.collect()  # before the next one is loaded: two may not fit
        seconds[step] = round(time.monotonic() - start, 1)
    return {"items": len(rows), "steps": list(steps), "seconds": seconds}


def read_rows(holdout: Path, config: dict[str, Any]) -> list[dict[str, Any]]:
    """The first ledger_items of the rows that the evaluation uses."""
    lines = holdout.read_text(encoding="utf-8").rstrip("\n").split("\n")
    return [json.loads(line) for line in lines[: config["max_items"]][: config["ledger_items"]]]


def ask(
    speaker: Speaker, rows: Sequence[dict[str, Any]], max_tokens: int, folder: Path, on_done: Callable[[int], None]
) -> list[dict[str, str]]:
    """The answers to all rows, in order; a batch whose file lies in the folder isn't asked again."""
    prompts = [prompt_ids(speaker, row["messages"][:-1]) for row in rows]
    batches = cut([len(prompt) for prompt in prompts], max_tokens, BATCH_TOKENS[speaker.model.device.type])
    folder.mkdir(parents=True, exist_ok=True)
    answers: dict[int, dict[str, str]] = {}
    for number, batch in enumerate(batches):
        file = folder / f"{number}.json"
        if not file.is_file():
            files.write_json(file, generate(speaker, [prompts[at] for at in batch], max_tokens))
        batch_answers = json.loads(file.read_text(encoding="utf-8"))
        answers |= {at: {"id": rows[at]["id"], **answer} for at, answer in zip(batch, batch_answers, strict=True)}
        on_done(len(answers))
    return [answers[at] for at in range(len(rows))]


def prompt_ids(speaker: Speaker, messages: Sequence[dict[str, str]]) -> list[int]:
    """The prompt as a server renders it: only the chat template adds special tokens."""
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
    """Greedy answers to a batch of prompts, padded on the left; a mask hides the padding."""
    import torch
    from transformers import GenerationConfig

    longest, pad = max(map(len, prompts)), speaker.end_tokens[0]
    ids = torch.tensor([[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    plain = GenerationConfig(
        do_sample=False, max_new_tokens=max_tokens, eos_token_id=list(speaker.end_tokens), pad_token_id=pad
    )
    speaker.model.generation_config = plain  # else generate() fills in the base's own settings
    device = speaker.model.device
    with torch.inference_mode():
        out = speaker.model.generate(ids.to(device), attention_mask=mask.to(device), generation_config=plain)
    return [_answer(speaker, row) for row in out[:, longest:].tolist()]


def _answer(speaker: Speaker, ids: list[int]) -> dict[str, str]:
    """The answer that a client gets: the text up to the end token, without special tokens."""
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
            problem = Problem(
                f"the ledger stops at the step {step}: its model is broken",
                remedy=f"mend the files that the next lines name, or {NO_LEDGER}",
            )
            raise ModelError([problem, *error.problems]) from error


if __name__ == "__main__":
    program.main(run)
