"""What a latent costs: the Fisher metric of a pack, and the curve that corrects it at useful strengths.

KL(base || steered by z) is z'Fz / 2 to second order, F the Fisher information of the next-token distribution along the
steering vectors. It is measured decode-only (contract 2) and teacher-forced on the base's own answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from edge_align.records import SteeringVectors
from edge_align.runtime.llamacpp import LlamaCppBackend

TOP = 128
"""Tokens per position over which the Fisher sum runs; the rest holds under one percent of the probability."""

Decode = Callable[[np.ndarray], SteeringVectors]


@dataclass(frozen=True)
class Probe:
    """Base answers on which steered and unsteered predictions are compared, with the base's log-probabilities."""

    prompts: Sequence[Sequence[int]]
    completions: Sequence[Sequence[int]]
    base: list[np.ndarray]  # per answer (T, n_vocab) float32 log-probabilities


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Along the last axis."""
    shifted = logits - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)), dtype=np.float32)


def open_probe(
    backend: LlamaCppBackend, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
) -> Probe:
    """Score the answers once without steering."""
    base = [log_softmax(logits) for logits in backend.score_many(prompts, completions, vectors=None)]
    return Probe(prompts, completions, base)


def measured_kl(backend: LlamaCppBackend, probe: Probe, vectors: SteeringVectors) -> float:
    """Mean KL(base || steered) over the probe's positions, nats per token."""
    total, count = 0.0, 0
    scored = backend.score_many(probe.prompts, probe.completions, vectors=vectors)
    for base, logits in zip(probe.base, scored, strict=True):
        total += float((np.exp(base) * (base - log_softmax(logits))).sum())
        count += len(base)
    return total / count


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
