"""Safetensors files: headers read and checked without torch, tensors streamed into bf16 shards one at a time.

The model of a Hugging Face folder is model.safetensors, or the files that model.safetensors.index.json names. Other
files are ignored.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pipeline.errors import ModelError, Problem, ResourceError

if TYPE_CHECKING:
    import torch

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 2**30  # several files, so that a served model's digest can be computed in parallel
HEADER_LIMIT = 100_000_000
LOST = "names missing files"
BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F4": 4,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
}


class BadHeader(ValueError):
    """A safetensors file with an invalid header; the text says why."""


@dataclass(frozen=True)
class Tensor:
    """A header's entry for one tensor: its shape, and its dtype as the format spells it (BF16, F32, …)."""

    name: str
    dtype: str
    shape: tuple[int, ...]


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name, from its header alone.

    Raises BadHeader when the header breaks off, isn't JSON, or doesn't cover the file's bytes exactly.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(HEADER_LIMIT, size - 8):
            raise BadHeader("isn't a safetensors file, or was cut off")
        try:
            header = json.loads(file.read(length), object_pairs_hook=_no_twins)
        except (ValueError, RecursionError) as error:
            raise BadHeader(f"its header isn't JSON: {error}") from error
    if not isinstance(header, dict):
        raise BadHeader("its header isn't a JSON object")
    header.pop("__metadata__", None)
    _check_cover(header, size - 8 - length)
    return {name: Tensor(name, entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()}


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a name appears twice")
    return entries


def _check_cover(header: Mapping[str, Any], data_bytes: int) -> None:
    """Raise BadHeader unless every tensor's bytes fit its shape and together fill the file without gap or overlap."""
    spans = []
    for name, entry in header.items():
        try:
            begin, end = entry["data_offsets"]
            fits = (end - begin) * 8 == math.prod(entry["shape"]) * BITS[entry["dtype"]]
        except (TypeError, ValueError, KeyError) as error:
            raise BadHeader(f"tensor {name} is described wrongly ({error!r})") from error
        if not fits:
            raise BadHeader(f"tensor {name} has {end - begin} bytes, which don't fit its shape {entry['shape']}")
        spans.append((begin, end))
    covered_bytes = 0
    for begin, end in sorted(spans):
        if begin != covered_bytes:
            raise BadHeader("its tensors overlap or leave gaps")
        covered_bytes = end
    if covered_bytes != data_bytes:
        raise BadHeader(f"its header promises {covered_bytes} bytes of tensors, the file holds {data_bytes}")


def files(folder: Path) -> list[Path]:
    """The model's weight files, in order; empty for a folder without weights.

    Raises ModelError when the index is broken or names missing files.
    """
    index = folder / INDEX
    if not index.is_file():
        return [folder / SINGLE] if (folder / SINGLE).is_file() else []
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(
            "the index isn't JSON with a weight_map", file=str(index), remedy="fetch the file again"
        ) from error
    missing = [str(name) for name in names if Path(name).name != name or not (folder / name).is_file()]
    if missing:
        raise ModelError(f"{LOST}: {', '.join(missing)}", file=str(index), remedy="fetch them again")
    return [folder / name for name in names]


def tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of the model in `folder`, by name. Raises ModelError for missing files and bad headers."""
    by_name: dict[str, Tensor] = {}
    for path in files(folder):
        try:
            by_name.update(read_header(path))
        except BadHeader as error:
            raise ModelError(str(error), file=str(path), remedy="fetch the file again") from error
    return by_name


class Reader:
    """Tensors of a folder by name, each read (memory-mapped) when it is called for; a context manager."""

    def __init__(self, folder: Path) -> None:
        self._paths = files(folder)
        self._stack = ExitStack()
        self._open: dict[str, Any] = {}

    def __enter__(self) -> Self:
        from safetensors import safe_open

        for path in self._paths:
            handle = self._stack.enter_context(safe_open(path, framework="pt"))
            self._open.update(dict.fromkeys(handle.keys(), handle))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def __call__(self, name: str) -> torch.Tensor:
        """The tensor of that name, as it lies in the file."""
        return self._open[name].get_tensor(name)


def in_order(shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """Names as a person counts: layer 2 before layer 10."""
    return sorted(shapes, key=lambda name: [(part.isdigit(), int(part) if part.isdigit() else 0, part)
                                            for part in re.split(r"(\d+)", name)])  # fmt: skip


def write(
    folder: Path,
    shapes: Mapping[str, Sequence[int]],
    tensor: Callable[[str], torch.Tensor],
    on_progress: Callable[[int, int], None],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write bf16 safetensors: each tensor comes from `tensor(name)` and is freed once written, so memory holds one.

    `on_progress` is called with the bytes written so far and the total. The same tensors give the same bytes. Raises
    ResourceError when the disk is too small, ModelError naming every tensor that holds NaN or infinity.
    """
    total = sum(2 * math.prod(shape) for shape in shapes.values())
    _check_disk(folder, total)
    shards = list(_shards(shapes, shard_bytes))
    names = [SINGLE] if len(shards) == 1 else [
        f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)
    ]  # fmt: skip
    bytes_so_far, bad = 0, []
    for file_name, shard in zip(names, shards, strict=True):
        with (folder / file_name).open("wb") as file:
            file.write(_header({name: shapes[name] for name in shard}))
            for name in shard:
                weight = _bf16(tensor(name), name, tuple(shapes[name]))
                bad += [] if weight.isfinite().all() else [name]
                file.write(memoryview(weight.view(-1).view(_uint8()).numpy()))
                bytes_so_far += 2 * weight.numel()
                on_progress(bytes_so_far, total)
    if bad:
        raise ModelError(_not_finite(bad))
    if len(shards) > 1:
        _write_index(folder, dict(zip(names, shards, strict=True)), total)


def _not_finite(bad: Sequence[str]) -> Iterator[Problem]:
    for name in bad:
        yield Problem(
            "holds NaN or infinity (or values beyond bf16)",
            key=name,
            allowed="finite numbers",
            remedy="fetch the weights again; of your own training, take a checkpoint from before it diverged",
        )


def _check_disk(folder: Path, need: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < need + 2**28:
        raise ResourceError(
            f"{need / 2**30:.1f} GiB of weights don't fit on the disk: {free / 2**30:.1f} GiB are free",
            file=str(folder),
            remedy="free some with `tunegate gc`, or set TUNEGATE_HOME to a larger disk",
        )


def _shards(shapes: Mapping[str, Sequence[int]], limit: int) -> Iterator[list[str]]:
    shard: list[str] = []
    size = 0
    for name in in_order(shapes):
        need = 2 * math.prod(shapes[name])
        if shard and size + need > limit:
            yield shard
            shard, size = [], 0
        shard.append(name)
        size += need
    yield shard


def _header(shapes: Mapping[str, Sequence[int]]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + 2 * math.prod(shape)
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # readers map the tensors, which must start on a multiple of 8
    return len(text).to_bytes(8, "little") + text


def _bf16(tensor: torch.Tensor, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    import torch

    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, not {shape}")
    return tensor.detach().to("cpu", torch.bfloat16).contiguous()


def _uint8() -> torch.dtype:
    import torch

    return torch.uint8


def _write_index(folder: Path, shards: Mapping[str, Iterable[str]], total: int) -> None:
    weight_map = {name: file for file, names in shards.items() for name in names}
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2, sort_keys=True)
    (folder / INDEX).write_text(text + "\n", encoding="utf-8")
