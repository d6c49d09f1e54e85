"""KL from the base as it is measured: decode-only (contract 2), teacher-forced on the base's own answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from edge_align.config import SamplingConfig
from edge_align.records import SteeringVectors, user_prompt
from edge_align.runtime.base import ScoresMany, Scoring
from edge_align.simulation.prompts import prompts

ANSWERS = 8
TOKENS = 32  # of each answer
STEPS = 8  # of the search for a factor; each one scores all answers
WITHIN = 0.02  # of the KL asked for


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


def open_probe(backend: ScoresMany, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> Probe:
    """Score the answers once without steering."""
    base = [log_softmax(logits) for logits in backend.score_many(prompts, completions, vectors=None)]
    return Probe(prompts, completions, base)


def measured_kl(backend: ScoresMany, probe: Probe, vectors: SteeringVectors | None) -> float:
    """Mean KL(base || steered) over the probe's positions, nats per token; None: of what `backend` is by itself."""
    total, count = 0.0, 0
    scored = backend.score_many(probe.prompts, probe.completions, vectors=vectors)
    for base, logits in zip(probe.base, scored, strict=True):
        total += float((np.exp(base) * (base - log_softmax(logits))).sum())
        count += len(base)
    return total / count


def sampled_probe(backend: Scoring, *, answers: int = ANSWERS, tokens: int = TOKENS, seed: int = 0) -> Probe:
    """A probe of answers that the base samples here, to prompts of the set `pack`. Takes seconds on a small base."""
    rendered = [backend.render(user_prompt(text)) for text in prompts("pack")[:answers]]
    made = backend.generate_batch(rendered, vectors=None, sampling=SamplingConfig(max_tokens=tokens, seed=seed))
    pairs = [(prompt, answer.tokens) for prompt, answer in zip(rendered, made, strict=True) if answer.tokens]
    return open_probe(backend, [prompt for prompt, _ in pairs], [answer for _, answer in pairs])


def factor_for_kl(
    backend: ScoresMany, probe: Probe, vectors: SteeringVectors, kl: float, *, ceiling: bool = False
) -> tuple[float, float]:
    """The factor of `vectors` at which the measured KL is `kl` within 2 %, and the KL there.

    ceiling: factor 1 is kept where it costs no more than `kl`.
    """
    return search_factor(lambda factor: measured_kl(backend, probe, vectors.scaled(factor)), kl, ceiling=ceiling)


def search_factor(kl_at: Callable[[float], float], kl: float, *, ceiling: bool = False) -> tuple[float, float]:
    """The factor of anything at which `kl_at(factor)` is `kl` within 2 %, and the KL there; begun at 1.

    KL grows about with the factor's square, so each step multiplies it by the root of what is missing.
    """
    factor, found = 1.0, kl_at(1.0)
    if ceiling and found <= kl:
        return factor, found
    for _ in range(STEPS):
        if found <= 0.0 or abs(found / kl - 1.0) <= WITHIN:
            break
        factor *= float(np.clip(np.sqrt(kl / found), 0.1, 10.0))
        found = kl_at(factor)
    return factor, found
