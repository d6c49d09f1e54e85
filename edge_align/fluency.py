"""Do answers stay fluent under a profile? Sampled with it, and read by the base without it.

KL is predicted on the base's own texts and does not see where a steered answer goes once it continues itself: of
profiles with the same KL per token, most wrote answers of 1.1 times the base's NLL, one of 1.6 times (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt

import numpy as np

from edge_align.config import SamplingConfig
from edge_align.kl import log_softmax
from edge_align.records import SteeringVectors, user_prompt
from edge_align.runtime.base import Scoring
from edge_align.simulation.prompts import prompts

ANSWERS = 16
TOKENS = 32  # of each; what goes wrong goes wrong early
CONTEXT = 512  # tokens a prompt and its answer may take
ROUNDS = 3  # of lowering the factor; each samples anew

Tell = Callable[[float], None]


def sampled_nll(backend: Scoring, vectors: SteeringVectors | None, *, tell: Tell | None = None) -> float:
    """Mean NLL under the unsteered base of answers sampled under `vectors`, nats per token.

    The prompts are of the set `pack`, the seeds always the same. Raises BackendError, SessionClosed.
    """
    rendered = [backend.render(user_prompt(text)) for text in prompts("pack")[:ANSWERS]]
    sampling = SamplingConfig(max_tokens=TOKENS, seed=0)
    done = None if tell is None else lambda n: tell(n / ANSWERS)
    made = backend.generate_batch(rendered, vectors=vectors, sampling=sampling, on_done=done)
    answers = [answer.tokens or (0,) for answer in made]
    total = 0.0
    for tokens, logits in zip(answers, backend.score_many(rendered, answers, vectors=None), strict=True):
        total -= float(log_softmax(logits)[np.arange(len(tokens)), list(tokens)].sum())
    return total / sum(map(len, answers))


def fluent_factor(
    backend: Scoring,
    vectors: SteeringVectors,
    *,
    limit: float,
    base_nll: float | None = None,
    tell: Tell | None = None,
) -> tuple[float, float]:
    """The factor of `vectors`, at most 1, at which answers keep within `limit` times the base's NLL; the ratio there.

    base_nll: `sampled_nll` of the base where it is known. The NLL rises about with the factor's square, faster where
    answers fall apart; after ROUNDS steps the ratio may still be over the limit.
    """
    if base_nll is None:
        base_nll = sampled_nll(backend, None)
    factor, ratio = 1.0, sampled_nll(backend, vectors, tell=tell) / base_nll
    for _ in range(ROUNDS):
        if ratio <= limit:
            break
        factor *= min(0.95, max(0.5, sqrt((limit - 1.0) / (ratio - 1.0))))
        ratio = sampled_nll(backend, vectors.scaled(factor)) / base_nll
    return factor, ratio
