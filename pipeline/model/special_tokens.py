"""A model's special tokens, settled: one ends an answer, one pads, and all files of the model agree.

A tokenizer with a wrong end token trains a model that never stops. So the end token is taken from the chat template:
it is the token that follows an assistant's answer. Where the model's metadata differ, they are corrected, and each
correction is reported. `settle` runs in the train environment, `end_tokens` wherever there is a tokenizer.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import ModelError, Problem
from pipeline.files import write_json
from pipeline.model.checks import read_object

ANSWER = "Forty-two."
PADS = (
    "<|finetune_right_pad_id|>",
    "<|pad|>",
    "<pad>",
    "[PAD]",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<unk>",
    "<|unk|>",
)


@dataclass(frozen=True)
class SpecialTokens:
    """The settled tokens. `eos_token` ends an answer; `eos_token_ids` are all ids at which a server stops."""

    eos_token: str
    eos_token_id: int
    eos_token_ids: tuple[int, ...]
    pad_token: str
    pad_token_id: int
    bos_token: str | None
    corrections: tuple[str, ...]


def settle(folder: Path) -> SpecialTokens:
    """Settle the special tokens of the model in `folder` and write them into its JSON files.

    Needs config.json, the tokenizer's files and chat_template.jinja there. Raises ModelError

    - when the chat template can't be rendered, or doesn't end an answer with a token of its own;
    - when a token is outside the embedding.
    """
    from transformers import AutoTokenizer

    config = read_object(folder / "config.json") or {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises plain Exception
        raise ModelError(
            f"transformers can't load the tokenizer: {error}",
            file=str(folder),
            remedy="fetch its files again",
        ) from error
    end = _end_of_answer(folder, tokenizer)
    end_id = int(tokenizer.convert_tokens_to_ids(end))
    metadata_ids = _metadata_ids(folder, config)
    eos = (*metadata_ids, end_id) if end_id not in metadata_ids else metadata_ids
    changes: dict[str, str] = {}
    corrections = []
    if end_id not in metadata_ids:
        corrections.append(
            f"{end} ({end_id}) added to eos_token_id {list(metadata_ids)}: the chat template ends answers with it"
        )
    if tokenizer.eos_token_id not in eos:
        corrections.append(f"eos_token was {tokenizer.eos_token}, now {end}")
        changes["eos_token"] = end
    bos = _bos(tokenizer, config)
    if bos != tokenizer.bos_token:
        corrections.append(f"bos_token was {tokenizer.bos_token}, now {bos}, as config.json states")
        changes["bos_token"] = str(bos)
    pad = _pad(tokenizer, {*eos, tokenizer.bos_token_id})
    if pad != tokenizer.pad_token:
        corrections.append(f"pad_token was {tokenizer.pad_token}, now {pad}")
        changes["pad_token"] = pad
    pad_id = int(tokenizer.convert_tokens_to_ids(pad))
    _check_rows(folder, config, len(tokenizer), eos, pad_id)
    _write(folder, changes, eos, pad_id, tokenizer.convert_tokens_to_ids(bos) if bos else None)
    return SpecialTokens(end, end_id, eos, pad, pad_id, bos, tuple(corrections))


def end_tokens(folder: Path, tokenizer: Any) -> set[int]:
    """The ids that end an answer of the model in `folder`: the tokenizer's, and those at which generation stops."""
    setting = (read_object(folder / "generation_config.json") or {}).get("eos_token_id")
    ids = setting if isinstance(setting, list) else [setting]
    return {token for token in (*ids, tokenizer.eos_token_id) if token is not None}


def _end_of_answer(folder: Path, tokenizer: Any) -> str:
    """The token that the chat template writes after an assistant's answer."""
    from jinja2 import TemplateError

    file = str(folder / "chat_template.jinja")
    conversation = [
        {"role": "user", "content": "What is six times seven?"},
        {"role": "assistant", "content": ANSWER},
    ]
    try:
        text = str(tokenizer.apply_chat_template(conversation, tokenize=False))
    except (TemplateError, TypeError, ValueError) as error:
        raise ModelError(
            f"can't be rendered: {error}", file=file, remedy="copy chat_template.jinja again from the model's source"
        ) from error
    rest = text.rpartition(ANSWER)[2].lstrip() if ANSWER in text else ""
    ends = [
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if token.content and rest.startswith(token.content)
    ]
    if not ends:
        raise ModelError(
            f"ends an answer with {rest[:40]!r}, which isn't a token: the model would never stop",
            file=file,
            allowed="an end token such as <|im_end|> after the assistant's content",
            remedy="copy chat_template.jinja again from the model's source, or correct it",
        )
    return str(max(ends, key=len))


def _metadata_ids(folder: Path, config: dict[str, Any]) -> tuple[int, ...]:
    """The end tokens in the model's own metadata, generation_config.json first."""
    ids: list[int] = []
    for source in ((read_object(folder / "generation_config.json") or {}), config):
        setting = source.get("eos_token_id")
        ids += [] if setting is None else setting if isinstance(setting, list) else [setting]
    return tuple(dict.fromkeys(int(number) for number in ids))


def _bos(tokenizer: Any, config: dict[str, Any]) -> str | None:
    """The beginning token: config.json's where the tokenizer has another one."""
    config_id = config.get("bos_token_id")
    if tokenizer.bos_token is None or not isinstance(config_id, int) or tokenizer.bos_token_id == config_id:
        return tokenizer.bos_token  # type: ignore[no-any-return]
    return str(tokenizer.convert_ids_to_tokens(config_id))


def _pad(tokenizer: Any, other_roles: set[int | None]) -> str:
    """A padding token without another role: the model's own, or one of PADS; failing these the end token.

    Labels are masked by position, never by token, so that even the end token may pad.
    """
    if tokenizer.pad_token is not None and tokenizer.pad_token_id not in other_roles:
        return str(tokenizer.pad_token)
    ids = {token.content: number for number, token in tokenizer.added_tokens_decoder.items()}
    free = [token for token in PADS if token in ids and ids[token] not in other_roles]
    return free[0] if free else str(tokenizer.pad_token or tokenizer.eos_token)


def _check_rows(folder: Path, config: dict[str, Any], tokens: int, eos: tuple[int, ...], pad: int) -> None:
    rows = int(config.get("vocab_size", 0))
    problems = [
        Problem(
            f"token {number} is outside the embedding",
            file=str(folder / "config.json"),
            key="vocab_size",
            allowed=f"ids below {rows}",
            remedy="take tokenizer and weights of the same revision",
        )
        for number in sorted({*eos, pad})
        if number >= rows
    ]
    if tokens > rows:
        problems.append(
            Problem(
                f"the tokenizer has {tokens} tokens, the embedding {rows} rows",
                file=str(folder / "config.json"),
                key="vocab_size",
                remedy="take tokenizer and weights of the same revision",
            )
        )
    if problems:
        raise ModelError(problems)


def _write(folder: Path, changes: dict[str, str], eos: tuple[int, ...], pad: int, bos: int | None) -> None:
    """Write the settled tokens into the folder's files; files that agree already stay byte for byte."""
    names = ["tokenizer_config.json"]
    names += ["special_tokens_map.json"] if (folder / "special_tokens_map.json").is_file() else []
    for name in names if changes else []:
        write_json(folder / name, (read_object(folder / name) or {}) | changes)
    generation = read_object(folder / "generation_config.json") or {}
    new_generation = generation | {"eos_token_id": list(eos) if len(eos) > 1 else eos[0], "pad_token_id": pad}
    if bos is not None:
        new_generation["bos_token_id"] = bos
    if new_generation != generation:
        write_json(folder / "generation_config.json", new_generation)
    config = read_object(folder / "config.json") or {}
    if config.get("eos_token_id") is None:
        write_json(folder / "config.json", config | {"eos_token_id": new_generation["eos_token_id"]})
