"""Hidden states of answers, added up by position: what of a state says only how far into an answer it is."""

from __future__ import annotations

import numpy as np


class PositionSums:
    """Sums over answers of hidden states at each position of an answer; filled by whoever computes the states.

    sums (room, n_layers, d_model) float64; counts (room,): answers that reach a position.
    """

    def __init__(self, room: int, n_layers: int, d_model: int) -> None:
        self.sums = np.zeros((room, n_layers, d_model))
        self.counts = np.zeros(room, np.int64)

    def add(self, layer: int, first: int, states: np.ndarray) -> None:
        """Add states (T, d_model) of the `layer`-th layer kept, of one answer, at positions `first` on."""
        at = slice(first, first + len(states))
        self.sums[at, layer] += states
        if layer == 0:
            self.counts[at] += 1

    def merge(self, sums: np.ndarray, counts: np.ndarray) -> None:
        """Add what another one holds; it may have less room."""
        self.sums[: len(sums)] += sums
        self.counts[: len(counts)] += counts


def centred(means: np.ndarray, lengths: np.ndarray, positions: PositionSums) -> np.ndarray:
    """Mean states (n, n_layers, d_model) of answers of `lengths` tokens, less what the mean answer has at the positions
    each of them covers.

    A short answer's plain mean is that of early positions, whose states differ from later ones whatever is said there.
    """
    reached = int((positions.counts > 0).sum())
    by_position = positions.sums[:reached] / positions.counts[:reached, None, None]
    running = np.cumsum(by_position, axis=0)
    last = np.clip(lengths, 1, reached)
    return np.asarray(means - running[last - 1] / last[:, None, None], dtype=np.float32)
