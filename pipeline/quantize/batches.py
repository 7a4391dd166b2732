"""Calibration samples in batches as large as a GPU has room for, or one at a time where it has little.

A GPU computes a sample of some hundred tokens faster than its kernels start, and a search for scales runs all kernels
some sixty times a layer. Samples of one batch are padded on the right. In a causal decoder no token sees a later one, so
padding changes no real token's output; `loss_mask` marks the padding. Sizes in, a plan out: torch is imported only for
tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

MOST_TOKENS = 8192
"""Tokens of a batch: enough to fill the largest GPU; more rows don't make its products faster."""
USED = 0.7
"""Share of free memory: this module's estimate doesn't count everything."""
ITEM = 2
"""Bytes of an activation: models come in 16 bits."""


@dataclass(frozen=True)
class Shape:
    """The sizes that decide how much memory a decoder layer takes."""

    hidden: int
    inner: int
    heads: int

    @classmethod
    def of(cls, config: Any) -> Shape:
        """From a transformers config of a dense decoder; the inner size defaults to four times the hidden one."""
        inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
        return cls(config.hidden_size, inner, config.num_attention_heads)

    def kept(self, tokens: int) -> int:
        """Bytes that stay through a layer's search: 2 * (7*hidden + inner) a token.

        They are the inputs of the layer, of its parts and of its last product, and the layer's output twice.
        """
        return tokens * ITEM * (7 * self.hidden + self.inner)

    def passing(self, longest: int) -> int:
        """Bytes a token takes while a batch passes the layer: the MLP's, and plain attention's scores for `longest` tokens."""
        return ITEM * (6 * self.inner + 8 * self.hidden) + 6 * ITEM * self.heads * longest

    @property
    def searching(self) -> int:
        """Bytes of a layer's weights in the search: the largest matrix in float64 twice, all matrices twice in 16 bits."""
        return self.hidden * self.inner * 2 * 8 + 2 * ITEM * self.hidden * (3 * self.inner + 4 * self.hidden)


def batch_tokens(shape: Shape, lengths: Sequence[int], free: float) -> int:
    """Tokens of a batch, with padding, that fit into `free` bytes; 0 if not even two samples fit.

    Room for a batch includes room for the activations between layers.
    """
    longest = max(lengths)
    tokens = min(MOST_TOKENS, room(shape, sum(lengths), free) // shape.passing(longest))
    return tokens if tokens >= 2 * longest else 0


def room(shape: Shape, tokens: int, free: float) -> int:
    """Bytes of `free` left for a passing batch beside the activations kept of `tokens`; may be negative."""
    return int(USED * free) - shape.kept(tokens) - shape.searching


def cut(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Places in `lengths`, the longest first, in batches of at most `budget` tokens with padding.

    Without a budget each sample is a batch of its own, in order.
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

    batches: list[dict[str, Any]] = []
    for places in cut([len(sample) for sample in samples], budget):
        rows = [torch.tensor(samples[at]) for at in places]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        batches.append({"input_ids": ids, "loss_mask": mask})
    if all(bool(batch["loss_mask"].all()) for batch in batches):
        return [{"input_ids": batch["input_ids"]} for batch in batches]
    return batches
