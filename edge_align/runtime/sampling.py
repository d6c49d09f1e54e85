"""The next token from logits, in numpy: top-k, then top-p, then temperature, as llama.cpp's sampler chain does.

And how likely a token was.
"""

from __future__ import annotations

import numpy as np

from edge_align.config import SamplingConfig
from edge_align.records import TokenLogprob

GREEDY_BELOW = 1e-6  # a temperature under this would overflow float32 logits


def draw(logits: np.ndarray, sampling: SamplingConfig, rng: np.random.Generator) -> int:
    """One token id for logits (n_vocab,); among equal logits the smaller id is the likelier one."""
    if sampling.temperature < GREEDY_BELOW:
        return int(logits.argmax())
    k = min(sampling.top_k, len(logits))
    if k < len(logits):
        lowest = np.partition(logits, len(logits) - k)[len(logits) - k]
        candidates = np.flatnonzero(logits >= lowest)
    else:
        candidates = np.arange(len(logits))
    order = candidates[np.argsort(-logits[candidates], kind="stable")][:k]
    p = np.exp(logits[order].astype(np.float64) - logits[order[0]])
    p /= p.sum()
    kept = max(1, int(np.count_nonzero(np.cumsum(p) - p < sampling.top_p)))
    p = np.exp((logits[order[:kept]].astype(np.float64) - logits[order[0]]) / sampling.temperature)
    return int(rng.choice(order[:kept], p=p / p.sum()))


def log_softmax_top(logits: np.ndarray, token: int, top: int) -> TokenLogprob:
    """The log-probability of `token` under logits (n_vocab,), and the `top` likeliest tokens with theirs."""
    peak = logits.max()
    total = float(peak) + float(np.log(np.exp((logits - peak).astype(np.float64)).sum()))
    best = np.argpartition(-logits, top)[:top] if top else np.empty(0, np.int64)
    best = best[np.lexsort((best, -logits[best]))]
    return TokenLogprob(token, float(logits[token]) - total, tuple((int(i), float(logits[i]) - total) for i in best))
