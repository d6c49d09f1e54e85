"""Do answers stay fluent and varied under a profile? Sampled with it, and read by the base without it.

KL is predicted on the base's own texts and does not see where a steered answer goes once it continues itself: of
profiles with the same KL per token, most wrote answers of 1.1 times the base's NLL, one of 1.6 times (docs/log.md).
Nor does it tell a change of a few words' odds, which makes answers alike, from one that is spread over many.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import log, sqrt

import numpy as np

from edge_align.config import SamplingConfig
from edge_align.kl import log_softmax
from edge_align.pack import BaseSample
from edge_align.records import SteeringVectors, user_prompt
from edge_align.runtime.base import Scoring
from edge_align.simulation.prompts import prompts

ANSWERS = 16
TOKENS = 32  # of each; what goes wrong goes wrong early
CONTEXT = 512  # tokens a prompt and its answer may take
ROUNDS = 3  # of lowering the factor, each of new samples
READ_ROUNDS = 6  # where nothing is sampled; one or two are usual
AIM = 0.98  # of what collisions may rise by: at the limit itself every other reading would be over it
STEP = (0.3, 0.98)  # of the factor, least and most
POWER = (1.0, 4.0)

Tell = Callable[[float], None]


def rendered_prompts(backend: Scoring) -> list[Sequence[int]]:
    """The prompts everything here is answered to."""
    return [backend.render(user_prompt(text)) for text in prompts("pack")[:ANSWERS]]


def sampled(
    backend: Scoring, vectors: SteeringVectors | None, *, seed: int = 0, tell: Tell | None = None
) -> tuple[tuple[tuple[int, ...], ...], float]:
    """Answers sampled under `vectors`, and their mean NLL under the unsteered base, nats per token.

    Raises BackendError, SessionClosed.
    """
    asked = rendered_prompts(backend)
    sampling = SamplingConfig(max_tokens=TOKENS, seed=seed)
    done = None if tell is None else lambda n: tell(n / ANSWERS)
    made = backend.generate_batch(asked, vectors=vectors, sampling=sampling, on_done=done)
    answers = tuple(answer.tokens or (0,) for answer in made)
    total = 0.0
    for tokens, logits in zip(answers, backend.score_many(asked, answers, vectors=None), strict=True):
        total -= float(log_softmax(logits)[np.arange(len(tokens)), list(tokens)].sum())
    return answers, total / sum(map(len, answers))


def sampled_nll(backend: Scoring, vectors: SteeringVectors | None, *, tell: Tell | None = None) -> float:
    """The NLL of `sampled` alone."""
    return sampled(backend, vectors, tell=tell)[1]


def sample_base(backend: Scoring, *, draws: int = 1) -> BaseSample:
    """What steered answers are held against; a pack brings its base's along, for a draw takes seconds.

    The NLL is the mean over `draws` samples: that of one is certain to a twentieth only.
    """
    made = [sampled(backend, None, seed=ANSWERS * i) for i in range(draws)]
    answers = made[0][0]
    return BaseSample(answers, float(np.mean([nll for _, nll in made])), collision(backend, answers, None))


def collision(backend: Scoring, answers: Sequence[Sequence[int]], vectors: SteeringVectors | None) -> float:
    """Collision probability of the next token: the sum over tokens of q squared.

    q is the mean, over all positions of `answers` (teacher-forced), of the distribution of the next token under
    `vectors`: two tokens of different answers are the same with this probability.
    """
    total, count = np.zeros(1), 0
    for logits in backend.score_many(rendered_prompts(backend), answers, vectors=vectors):
        total = total + np.exp(log_softmax(logits)).sum(0, dtype=np.float64)
        count += len(logits)
    return float(((total / count) ** 2).sum())


def varied_factor(backend: Scoring, vectors: SteeringVectors, base: BaseSample, *, limit: float) -> tuple[float, float]:
    """The factor of `vectors`, at most 1, at which words collide at most `limit` times as often; the ratio there.

    What is over 1 rises about with a power of the factor: its square at first, then the power between the last two
    readings. After READ_ROUNDS steps the ratio may still be over the limit.
    """
    factor, ratio = 1.0, collision(backend, base.answers, vectors) / base.collision
    power = 2.0
    for _ in range(READ_ROUNDS):
        if ratio <= limit:
            break
        step = float(np.clip((AIM * (limit - 1.0) / (ratio - 1.0)) ** (1 / power), *STEP))
        before, factor = ratio - 1.0, factor * step
        ratio = collision(backend, base.answers, vectors.scaled(factor)) / base.collision
        if ratio > limit:
            power = float(np.clip(log(before / (ratio - 1.0)) / -log(step), *POWER))
    return factor, ratio


def fluent_factor(
    backend: Scoring,
    vectors: SteeringVectors,
    *,
    limit: float,
    base_nll: float,
    tell: Tell | None = None,
) -> tuple[float, float]:
    """The factor of `vectors`, at most 1, at which answers keep within `limit` times the base's NLL; the ratio there.

    base_nll: `sampled_nll` of the base. The NLL rises about with the factor's square, faster where answers fall apart;
    after ROUNDS steps the ratio may still be over the limit.
    """
    factor, ratio = 1.0, sampled_nll(backend, vectors, tell=tell) / base_nll
    for _ in range(ROUNDS):
        if ratio <= limit:
            break
        factor *= min(0.95, max(0.5, sqrt((limit - 1.0) / (ratio - 1.0))))
        ratio = sampled_nll(backend, vectors.scaled(factor)) / base_nll
    return factor, ratio
