"""How far two engines agree: on logits, and on how much steering moves one answer's probability against another's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from edge_align.kl import log_softmax


@dataclass(frozen=True, slots=True)
class Agreement:
    """max_difference: of logits. agreement: share of positions with the same likeliest token. widest_gap: between the
    two likeliest logits of the first engine, over positions where the likeliest token differs; 0 without any."""

    positions: int
    max_difference: float
    agreement: float
    widest_gap: float


def agreement(wanted: Iterable[np.ndarray], got: Iterable[np.ndarray]) -> Agreement:
    """Of teacher-forced logits, one (T_i, n_vocab) array per text; at least one position in all."""
    positions = same = 0
    difference = gap = 0.0
    for a, b in zip(wanted, got, strict=True):
        if not len(a):
            continue
        equal = a.argmax(1) == b.argmax(1)
        two = np.partition(a, -2, axis=1)[:, -2:]
        positions, same = positions + len(a), same + int(equal.sum())
        difference = max(difference, float(np.abs(a - b).max()))
        gap = max(gap, float(np.where(equal, 0.0, two[:, 1] - two[:, 0]).max()))
    return Agreement(positions, difference, same / positions, gap)


def log_prob(logits: np.ndarray, tokens: Sequence[int]) -> float:
    """Log-probability, in nats, of tokens (T,) under teacher-forced logits (T, n_vocab)."""
    return float(log_softmax(logits)[np.arange(len(tokens)), np.asarray(tokens)].sum(dtype=np.float64))


def relative_error(wanted: Sequence[float], got: Sequence[float]) -> float:
    """Sum of absolute differences over the sum of absolute wanted values; they are not all zero."""
    a, b = np.asarray(wanted), np.asarray(got)
    return float(np.abs(b - a).sum() / np.abs(a).sum())
