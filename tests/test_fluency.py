"""How much less likely a profile's answers are under the base, and what strength keeps that within a limit."""

from __future__ import annotations

import numpy as np
import pytest

from edge_align.config import SamplingConfig
from edge_align.fluency import ANSWERS, fluent_factor, sampled_nll, TOKENS
from edge_align.records import Completion, SteeringVectors, user_prompt
from edge_align.simulation.prompts import prompts


class Noisier:
    """A base of two tokens: steered, its answers hold the unlikely one in a share that grows with the strength."""

    def __init__(self) -> None:
        self.asked: list[float] = []

    def render(self, prompt):
        return [1, 2]

    def generate_batch(self, rendered, *, vectors, sampling, on_done=None):
        strength = 0.0 if vectors is None else float(np.abs(vectors.array).max())
        self.asked.append(strength)
        unlikely = round(sampling.max_tokens * min(1.0, strength**2 / 2))
        tokens = (1,) * unlikely + (0,) * (sampling.max_tokens - unlikely)
        return [Completion("", tokens, "length") for _ in rendered]

    def score_many(self, rendered, answers, *, vectors):
        assert vectors is None  # the base reads them, unsteered
        for tokens in answers:
            yield np.tile(np.log(np.array([[0.75, 0.25]], np.float32)), (len(tokens), 1))


def steering(strength: float) -> SteeringVectors:
    array = np.zeros((3, 2), np.float32)
    array[1] = strength
    return SteeringVectors(array)


def test_nll_is_that_of_the_tokens_drawn():
    backend = Noisier()
    assert sampled_nll(backend, None) == pytest.approx(-np.log(0.75), rel=1e-5)
    half = -(np.log(0.75) + np.log(0.25)) / 2
    assert sampled_nll(backend, steering(1.0)) == pytest.approx(half, rel=1e-5)


def test_a_profile_within_the_limit_keeps_its_strength():
    factor, ratio = fluent_factor(Noisier(), steering(0.25), limit=1.2)
    assert factor == 1.0 and 1.0 < ratio <= 1.2


@pytest.mark.parametrize("strength", [0.6, 1.0, 3.0])
def test_a_stronger_one_loses_what_is_too_much_and_no_more(strength):
    """By hand: a share s of unlikely tokens adds s ln 3 to an NLL of ln 4/3, so a ratio of 1.5 has s = .131."""
    backend = Noisier()
    factor, ratio = fluent_factor(backend, steering(strength), limit=1.5)
    assert 1.0 <= ratio <= 1.5 and 0.25 < strength * factor <= 0.53
    assert backend.asked[0] == 0.0  # the base's own NLL, unless it is known
    again = Noisier()
    assert fluent_factor(again, steering(strength), limit=1.5, base_nll=-np.log(0.75)) == pytest.approx((factor, ratio))
    assert 0.0 not in again.asked


def test_on_the_real_base_against_a_plain_reading_of_the_same_answers(backend):
    """One prompt and one token at a time; the batch rounds differently (8-bit activations)."""
    array = np.zeros((30, 576), np.float32)
    array[10:20] = np.random.default_rng(0).normal(size=576) * 0.5
    vectors = SteeringVectors(array)
    rendered = [backend.render(user_prompt(text)) for text in prompts("pack")[:ANSWERS]]
    made = backend.generate_batch(rendered, vectors=vectors, sampling=SamplingConfig(max_tokens=TOKENS, seed=0))
    nll = []
    for prompt, answer in zip(rendered, made, strict=True):
        logits = backend.score(prompt, [answer.tokens], vectors=None)[0].astype(np.float64)
        nll += [np.log(np.exp(row).sum()) - row[token] for row, token in zip(logits, answer.tokens, strict=True)]
    found = sampled_nll(backend, vectors)
    assert found == pytest.approx(np.mean(nll), rel=0.01)
    assert found > 1.05 * sampled_nll(backend, None)
