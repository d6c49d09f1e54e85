"""What a latent costs: the Fisher metric of a pack, and the curve that corrects it at useful strengths.

KL(base || steered by z) is z'Fz / 2 to second order, F the Fisher information of the next-token distribution along the
steering vectors. It is measured decode-only (contract 2) and teacher-forced on the base's own answers.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from edge_align.kl import log_softmax, Probe
from edge_align.records import SteeringVectors
from edge_align.runtime.llamacpp import LlamaCppBackend

TOP = 128
"""Tokens per position over which the Fisher sum runs; the rest holds under one percent of the probability."""

Decode = Callable[[np.ndarray], SteeringVectors]


def fisher_metric(
    backend: LlamaCppBackend, probe: Probe, decode: Decode, *, k: int, step: float, tell: Callable[[float], None]
) -> np.ndarray:
    """F (k, k): finite differences of the log-probabilities along each latent, `step` far."""
    likely = [np.argpartition(base, -TOP, axis=1)[:, -TOP:] for base in probe.base]
    at_base = [np.take_along_axis(base, top, 1) for base, top in zip(probe.base, likely, strict=True)]
    slopes = np.empty((k, sum(len(base) for base in probe.base), TOP), np.float32)
    for j in range(k):
        direction = np.zeros(k, np.float32)
        direction[j] = step
        scored = backend.score_many(probe.prompts, probe.completions, vectors=decode(direction))
        rows = [
            (np.take_along_axis(log_softmax(logits), top, 1) - base) / step
            for logits, top, base in zip(scored, likely, at_base, strict=True)
        ]
        slopes[j] = np.concatenate(rows)
        tell((j + 1) / k)
    weight = np.exp(np.concatenate(at_base))
    weight /= weight.sum(1, keepdims=True)
    centred = slopes - (slopes * weight).sum(2, keepdims=True)
    scaled = (centred * np.sqrt(weight)).reshape(k, -1).astype(np.float64)
    return np.asarray(scaled @ scaled.T / len(weight), dtype=np.float32)
