"""How much less likely a profile's answers are under the base, and what strength keeps that within a limit."""

from __future__ import annotations

import numpy as np
import pytest

from edge_align import fluency
from edge_align.config import SamplingConfig
from edge_align.fluency import ANSWERS, collision, fluent_factor, sample_base, sampled_nll, TOKENS, varied_factor
from edge_align.pack import BaseSample
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


BASE_NLL = -np.log(0.75)


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
    factor, ratio = fluent_factor(Noisier(), steering(0.25), limit=1.2, base_nll=BASE_NLL)
    assert factor == 1.0 and 1.0 < ratio <= 1.2


@pytest.mark.parametrize("strength", [0.6, 1.0, 3.0])
def test_a_stronger_one_loses_what_is_too_much_and_no_more(strength):
    """By hand: a share s of unlikely tokens adds s ln 3 to an NLL of ln 4/3, so a ratio of 1.5 has s = .131."""
    factor, ratio = fluent_factor(Noisier(), steering(strength), limit=1.5, base_nll=BASE_NLL)
    assert 1.0 <= ratio <= 1.5 and 0.25 < strength * factor <= 0.53


class Narrower(Noisier):
    """A base of two equally likely tokens; steered by s, the odds of the first are e to the s at every position."""

    def score_many(self, rendered, answers, *, vectors):
        strength = 0.0 if vectors is None else float(vectors.array.max())
        for tokens in answers:
            yield np.tile(np.array([[strength, 0.0]], np.float32), (len(tokens), 1))


def test_collisions_are_those_of_the_mean_distribution():
    """By hand: odds of 3 to 1 are .75 and .25, which collide with a chance of .625; even odds with one of .5."""
    answers = ((0, 1), (0, 1, 1))
    assert collision(Narrower(), answers, None) == pytest.approx(0.5)
    assert collision(Narrower(), answers, steering(np.log(3))) == pytest.approx(0.625)


def test_the_mean_is_over_all_positions_of_all_answers():
    """Two certain but different positions of one answer, one of another: q = (2/3, 1/3), and 5/9 of pairs collide."""

    class Certain(Noisier):
        def score_many(self, rendered, answers, *, vectors):
            yield np.array([[50.0, 0.0], [0.0, 50.0]], np.float32)
            yield np.array([[50.0, 0.0]], np.float32)

    assert collision(Certain(), ((0, 0), (0,)), None) == pytest.approx(5 / 9)


@pytest.mark.parametrize("strength", [0.2, 2.0, 6.0])
def test_a_profile_that_says_the_same_words_is_weakened_to_the_limit(strength):
    """Even odds collide with .5, so 1.3 times that is .65: odds of 3.4 to 1, a strength of 1.22 (q^2 + (1-q)^2)."""
    base = BaseSample(((0, 1),), 1.0, 0.5)
    factor, ratio = varied_factor(Narrower(), steering(strength), base, limit=1.3)
    assert ratio <= 1.3 and (factor == 1.0 if strength < 1.22 else 0.3 < strength * factor <= 1.2257)


class Steadier(Narrower):
    """Odds of the first token that make collisions rise in proportion to the strength: q (1 - q) = (1 - s) / 4."""

    def __init__(self) -> None:
        self.readings = 0

    def score_many(self, rendered, answers, *, vectors):
        self.readings += 1
        root = float(np.sqrt(vectors.array.max()))
        for tokens in answers:
            yield np.tile(np.log(np.array([[1 + root, 1 - root]], np.float32)), (len(tokens), 1))


def test_where_collisions_rise_slower_than_the_square_three_readings_are_enough():
    """Collisions are .5 (1 + s): a strength of .2 is at the limit of 1.2. Steps by the square alone take seven."""
    steadier = Steadier()
    factor, ratio = varied_factor(steadier, steering(0.6), BaseSample(((0, 1),), 1.0, 0.5), limit=1.2)
    assert steadier.readings == 3 and 0.19 < 0.6 * factor <= 0.2 and ratio == pytest.approx(1 + 0.6 * factor)


def test_the_base_is_held_against_itself():
    own = sample_base(Noisier(), draws=2)
    assert own.answers == ((0,) * TOKENS,) * ANSWERS
    assert own.nll == pytest.approx(BASE_NLL, rel=1e-5) and own.collision == pytest.approx(0.75**2 + 0.25**2)


def test_on_the_real_base_against_a_plain_reading_of_the_same_answers(backend, monkeypatch):
    """One prompt and one token at a time; the batch rounds differently (8-bit activations)."""
    monkeypatch.setattr(fluency, "ANSWERS", few := 6)
    array = np.zeros((30, 576), np.float32)
    array[10:20] = np.random.default_rng(0).normal(size=576) * 0.5
    vectors = SteeringVectors(array)
    rendered = [backend.render(user_prompt(text)) for text in prompts("pack")[:few]]
    made = backend.generate_batch(rendered, vectors=vectors, sampling=SamplingConfig(max_tokens=TOKENS, seed=0))
    nll = []
    for prompt, answer in zip(rendered, made, strict=True):
        logits = backend.score(prompt, [answer.tokens], vectors=None)[0].astype(np.float64)
        nll += [np.log(np.exp(row).sum()) - row[token] for row, token in zip(logits, answer.tokens, strict=True)]
    found = sampled_nll(backend, vectors)
    assert found == pytest.approx(np.mean(nll), rel=0.01)
    assert found > 1.05 * sampled_nll(backend, None)
