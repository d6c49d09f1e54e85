"""Arithmetic of token sequences that engines and the server share."""

from __future__ import annotations

import numpy as np


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens two arrays share from the start."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n


def rate(n: int, seconds: float) -> float:
    """Tokens per second; 0 for none, or no time."""
    return n / seconds if n > 0 and seconds > 0 else 0.0
