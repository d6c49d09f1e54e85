"""Rows of a PyTorch batch: which go together, their keys and values, attention of one query each, the token drawn."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from edge_align.config import SamplingConfig


def batches(order: Sequence[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Consecutive runs of `order` (sorted by length) whose padded size stays within `budget` tokens."""
    found: list[list[int]] = []
    for i in order:
        if found and (len(found[-1]) + 1) * lengths[i] <= budget:
            found[-1].append(i)
        else:
            found.append([i])
    return found


def attend_one(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Attention of one query per row: two batched products are several times faster here than the fused kernel."""
    batch, heads, _, width = q.shape
    grouped = q.view(batch, k.shape[1], heads // k.shape[1], width) * width**-0.5
    weights = (grouped @ k.transpose(-1, -2)).float().masked_fill(~mask, -torch.inf).softmax(-1)
    mixed: torch.Tensor = weights.to(v.dtype) @ v
    return mixed.view(batch, heads, 1, width)


def draw(logits: torch.Tensor, sampling: SamplingConfig, rng: torch.Generator) -> torch.Tensor:
    """One token per row of logits (B, n_vocab): top-k, then top-p, then temperature."""
    if sampling.temperature == 0.0:
        return logits.argmax(-1)
    values, indices = logits.topk(min(sampling.top_k, logits.shape[-1]))
    before = values.softmax(-1).cumsum(-1).roll(1, -1)
    before[:, 0] = 0.0
    values = (values / sampling.temperature).masked_fill(before >= sampling.top_p, -torch.inf)
    values[:, 0] = values[:, 0].nan_to_num(neginf=0.0)
    return indices.gather(-1, torch.multinomial(values.softmax(-1), 1, generator=rng))[:, 0]


class KVCache:
    """Keys and values of a batch, rows of different length; one slot is written per row and step."""

    def __init__(
        self, size: tuple[int, int, int, int, int], dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        """size: (n_layer, batch, n_head_kv, length, d_head)."""
        _, batch, *_ = size
        self.keys = torch.zeros(size, dtype=dtype, device=device)
        self.values = torch.zeros(size, dtype=dtype, device=device)
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device)
        self.longest = 0  # of `lengths`, or more: asking the device for it at every block would wait for it

    def append(self, il: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store k, v (B, n_head_kv, T, d_head) after what each row holds; returns everything up to the longest."""
        if k.shape[2] == 1:
            rows = torch.arange(k.shape[0], device=k.device)
            self.keys[il, rows, :, self.lengths] = k[:, :, 0]
            self.values[il, rows, :, self.lengths] = v[:, :, 0]
            span = self.longest + 1
            return self.keys[il, :, :, :span], self.values[il, :, :, :span]
        self.keys[il, :, :, : k.shape[2]] = k
        self.values[il, :, :, : v.shape[2]] = v
        return k, v

    def select(self, rows: torch.Tensor) -> None:
        """Keep these rows only."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]
        self.lengths = self.lengths[rows]
