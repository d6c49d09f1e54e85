"""Arithmetic of token sequences that engines and the server share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edge_align.errors import InputError


def token_ids(tokens: Sequence[int], name: str, *, n_vocab: int) -> np.ndarray:
    """(n,); an empty one may have any dtype. Raises InputError unless all are ids of the vocabulary."""
    array = np.asarray(tokens)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise InputError(f"the {name} is not a list of token ids")
    if array.size and not (array.min() >= 0 and array.max() < n_vocab):
        raise InputError(f"the {name} holds a token id outside the vocabulary of {n_vocab}")
    return array


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens two arrays share from the start."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n


def rate(n: int, seconds: float) -> float:
    """Tokens per second; 0 for none, or no time."""
    return n / seconds if n > 0 and seconds > 0 else 0.0
