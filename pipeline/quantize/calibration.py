"""The token ids that a quantizer calibrates on: conversations as the chat template renders them.

Both environments run this code. A tokenizer.json means the same to transformers 4 and 5; their tokenizer_config.json and
automatic classes differ.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import DataError, ModelError
from pipeline.model.checks import template_of

PROBE_TOKENS = 512
SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


@dataclass(frozen=True)
class Sample:
    """One conversation as token ids; `judged` is the answer with its end token, or a text's tokens after its first.

    The template writes the last `behind` tokens after the end token: mostly a line break, neither trained on nor generated.
    """

    ids: tuple[int, ...]
    answer: int = 1
    behind: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    def end(self, longest: int) -> Sample:
        """The last `longest` tokens, where the answer is."""
        start = max(0, len(self) - longest)
        return Sample(self.ids[start:], max(1, self.answer - start), self.behind)

    @property
    def judged(self) -> slice:
        """The answer's place in `ids`."""
        return slice(self.answer, len(self) - self.behind)


@dataclass(frozen=True)
class Calibration:
    """The quantizer's samples, the probe that checks its work, and how many samples were cut short."""

    samples: tuple[Sample, ...]
    probe: tuple[Sample, ...]
    cut_short: int

    @property
    def tokens(self) -> int:
        """Tokens of the samples together."""
        return sum(map(len, self.samples))

    def __str__(self) -> str:
        tail = f", {self.cut_short} of them cut short" if self.cut_short else ""
        return f"{len(self.samples)} conversations of {self.tokens} tokens{tail}"


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of calibration.jsonl. Raises DataError when there are none."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not rows:
        raise DataError(
            "the calibration set is empty",
            file=str(path),
            remedy="raise data.calibration_set_size, or give more rows",
        )
    return rows


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer.json with its special tokens and chat template, whatever class its config names.

    Without a tokenizer.json transformers converts tokenizer.model, which needs sentencepiece. Raises ModelError without it.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    file = folder / "tokenizer.json"
    if not file.is_file():
        try:
            return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except (ImportError, OSError, ValueError) as error:
            raise ModelError(
                f"tokenizer.model can't be read here: {error}",
                file=str(folder),
                remedy="set quantize.backend: llmcompressor",
            ) from error
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    special = {key: _text(config[key]) for key in SPECIAL if config.get(key)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file), **special)
    tokenizer.chat_template = template_of(folder).get("default")
    return tokenizer


def _text(token: Any) -> str:
    """A special token as its text: older files keep an object."""
    return str(token["content"] if isinstance(token, dict) else token)


def encode(rows: Sequence[dict[str, Any]], tokenizer: Any, end_tokens: Collection[int]) -> list[Sample]:
    """Rows as token ids: the whole conversation through the chat template, or the text; `end_tokens` end an answer."""
    return [_encoded(row, tokenizer, end_tokens) for row in rows]


def _encoded(row: dict[str, Any], tokenizer: Any, end_tokens: Collection[int]) -> Sample:
    def ids(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

    if "text" in row:
        return Sample(ids(row["text"]))
    render, messages = tokenizer.apply_chat_template, row["messages"]
    whole = ids(render(messages, tokenize=False))
    prompt = ids(render(messages[:-1], tokenize=False, add_generation_prompt=True))
    answer = len(prompt) if whole[: len(prompt)] == prompt else 1
    end = max((at for at in range(answer, len(whole)) if whole[at] in end_tokens), default=len(whole) - 1)
    return Sample(whole, answer, len(whole) - 1 - end)


def take(rows: Sequence[Sample], samples: int, longest: int) -> Calibration:
    """The first `samples` rows for the quantizer; for the probe the rows after them, or else the first ones.

    A conversation longer than `longest` tokens keeps its end. Raises DataError when no row has two tokens.
    """
    usable = [sample for sample in rows if len(sample) > 1]
    if not usable:
        raise DataError("no calibration row has two tokens", remedy="look at calibration.jsonl and the chat template")
    first, spare = usable[:samples], usable[samples:]
    return Calibration(
        samples=tuple(sample.end(longest) for sample in first),
        probe=_probe([sample.end(longest) for sample in spare or first]),
        cut_short=sum(len(sample) > longest for sample in first),
    )


def _probe(candidates: Sequence[Sample]) -> tuple[Sample, ...]:
    """Candidates in order until PROBE_TOKENS are reached, at least one."""
    probe: list[Sample] = []
    for sample in candidates:
        if probe and sum(map(len, probe)) + len(sample) > PROBE_TOKENS:
            break
        probe.append(sample)
    return tuple(probe)
