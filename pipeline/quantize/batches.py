"""Calibration samples in batches as large as a GPU has room for, or one at a time where it has little.

A sample of some hundred tokens keeps a GPU busy for less time than it takes to start its kernels, and a search for
scales runs all of them some sixty times a layer. Samples of one batch are padded on the right: in a causal decoder no
token sees what follows it, so padding changes nothing that is read, and `loss_mask` says where there is padding. Sizes
in, a plan out: no torch until tensors are made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MOST_TOKENS = 8192
"""Of a batch: enough to fill the largest GPU, as more rows no longer make its products faster."""
USED = 0.7
"""Of free memory, because what is counted here isn't all."""
ITEM = 2
"""Bytes of an activation: models come in 16 bits."""


@dataclass(frozen=True)
class Shape:
    """What decides how much memory a decoder layer takes."""

    hidden: int
    inner: int
    heads: int

    @classmethod
    def of(cls, config: Any) -> Shape:
        """By a transformers config of a dense decoder; an inner size that it doesn't name is four times the hidden one."""
        inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
        return cls(config.hidden_size, inner, config.num_attention_heads)

    def kept(self, tokens: int) -> int:
        """Bytes that stay through a layer's search: what the layer, its parts and its last product took, and gave twice."""
        return tokens * ITEM * (7 * self.hidden + self.inner)

    def passing(self, longest: int) -> int:
        """Bytes a token takes while a batch passes the layer: the MLP's, and plain attention's scores of `longest` others."""
        return ITEM * (6 * self.inner + 8 * self.hidden) + 6 * ITEM * self.heads * longest

    @property
    def searching(self) -> int:
        """Bytes of a layer's weights in the search: the largest matrix in float64 twice, all of them twice in 16 bits."""
        return self.hidden * self.inner * 2 * 8 + 2 * ITEM * self.hidden * (3 * self.inner + 4 * self.hidden)


def batch_tokens(shape: Shape, lengths: Sequence[int], free: float) -> int:
    """Tokens of a batch, padding counted, that `free` bytes have room for; 0: not even for two samples at once.

    With room there is room for all that lies between layers too.
    """
    longest = max(lengths)
    tokens = min(MOST_TOKENS, room(shape, sum(lengths), free) // shape.passing(longest))
    return tokens if tokens >= 2 * longest else 0


def room(shape: Shape, tokens: int, free: float) -> int:
    """Of `free` bytes, what is left for a passing batch beside all that is kept of `tokens`; may be negative."""
    return int(USED * free) - shape.kept(tokens) - shape.searching


def cut(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Places in `lengths`, the longest first, in batches of at most `budget` tokens with padding.

    Without a budget each stands alone, in its order.
    """
    if not budget:
        return [[at] for at in range(len(lengths))]
    batches: list[list[int]] = []
    for at in sorted(range(len(lengths)), key=lambda at: (-lengths[at], at)):
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > budget:
            batches.append([])
        batches[-1].append(at)
    return batches


def tensors(samples: Sequence[Sequence[int]], budget: int) -> list[dict[str, Any]]:
    """The samples as `input_ids` of shape (samples, tokens), with a `loss_mask` of that shape if any are padded."""
    import torch

    padded: list[Mapping[str, Any]] = []
    for batch in cut([len(sample) for sample in samples], budget):
        some = [torch.tensor(samples[at]) for at in batch]
        ids = torch.nn.utils.rnn.pad_sequence(some, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(one) for one in some], batch_first=True)
        padded.append({"input_ids": ids, "loss_mask": mask})
    if all(bool(batch["loss_mask"].all()) for batch in padded):
        return [{"input_ids": batch["input_ids"]} for batch in padded]
    return [dict(batch) for batch in padded]
