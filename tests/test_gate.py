"""The gate: chance does not pass, taste does, and the numbers it reports are what they are called."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference.people import direction, feedback

from edge_align.gate import (
    agreement,
    cross_validate,
    earns_head,
    folds,
    GATE_P,
    HeldOut,
    split_half_reliability,
    wilson,
)
from edge_align.latent_dpo import draw_contrasts, LatentDPOConfig

CONFIG = LatentDPOConfig()
VARIANCE = np.full(8, 0.4, np.float32)


def judged(people, *, permutations=99, seed=0, config=CONFIG) -> HeldOut:
    variance = np.full(people.k, 0.4, np.float32)
    contrasts = draw_contrasts(people, variance, config=config, seed=seed)
    return cross_validate(people, contrasts, config=config, permutations=permutations, seed=seed)


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    # by hand from (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n), z = 1.96
    [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (50, 100, 0.4038, 0.5962), (10, 10, 0.7225, 1.0), (0, 0, 0.0, 1.0)],
)
def test_wilson_intervals_are_those_computed_by_hand(correct, n, low, high):
    assert wilson(correct, n) == pytest.approx((low, high), abs=5e-5)


@given(st.lists(st.integers(0, 30), min_size=1, max_size=60), st.integers(2, 12), st.integers(0, 5))
def test_folds_never_split_a_group_and_are_nearly_equal_in_groups(groups, most, seed):
    groups = np.array(groups)
    fold = folds(groups, most=most, seed=seed)
    of_group = {group: set(fold[groups == group]) for group in groups}
    assert all(len(found) == 1 for found in of_group.values())
    sizes = np.bincount([min(found) for found in of_group.values()])
    assert len(sizes) <= most
    assert sizes.max() - sizes.min() <= 1 or len(of_group) == 1


def test_chance_passes_no_more_often_than_the_level_says():
    """200 people without taste, 49 permutations: p is 1/50 with probability .02. P(more than 11 of 200) < .001."""
    config = replace(CONFIG, draws=4, contrasts=2, steps=15)
    p = [judged(feedback(pairs=14, k=4, seed=i), permutations=49, seed=i, config=config).p for i in range(200)]
    assert sum(value <= GATE_P for value in p) <= 11
    assert 0.4 < np.mean(p) < 0.62  # uniform on 1/50 .. 1: mean .51, standard error .02
    assert np.min(p) >= 1 / 50


@pytest.mark.parametrize(("pairs", "ratings"), [(30, 0), (0, 60), (20, 30)])
def test_a_taste_passes_in_pairs_ratings_and_both(pairs, ratings):
    found = judged(feedback(pairs=pairs, ratings=ratings, taste=direction()))
    assert found.passes and found.p == 1 / 100  # nothing among 99 permutations comes near
    assert found.n == pairs + ratings
    assert found.accuracy > 0.7 and found.ci_low < found.accuracy < found.ci_high
    assert found.z > 2.3 and found.more_rows() is not None


def test_agreement_is_the_double_sum_over_rows_of_different_prompts():
    """Naively, one permutation at a time, from the definition."""
    people = feedback(pairs=7, ratings=5, taste=direction())
    people = replace(people, pair_group=np.array([0, 0, 1, 2, 3, 3, 4]), rated_group=np.array([0, 5, 6, 6, 2]))
    people = replace(people, pair_weight=np.linspace(0.5, 1.5, 7, dtype=np.float32))
    found = agreement(people, permutations=3, rng=np.random.default_rng(4))
    rng = np.random.default_rng(4)
    flips = rng.integers(0, 2, (4, 7)) * 2 - 1
    labels = [float(up) * 2 - 1 for up in people.rated_up]
    groups = [*people.pair_group, *people.rated_group]
    for at in range(4):
        given = labels if at == 0 else list(rng.permutation(labels))
        said = []
        for i in range(7):
            row = (people.chosen[i] - people.rejected[i]).astype(float)
            sign = 1 if at == 0 else flips[at, i]
            said.append(sign * people.pair_weight[i] * row / np.linalg.norm(row) ** 0.5)
        for i in range(5):
            row = people.rated[i].astype(float)
            said.append((given[i] - np.mean(labels)) * row / np.linalg.norm(row) ** 0.5)
        total = sum(said[i] @ said[j] for i in range(12) for j in range(12) if groups[i] != groups[j])
        assert found[at] == pytest.approx(total, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("label", [True, False])
def test_ratings_that_all_say_the_same_prove_nothing(label):
    people = feedback(ratings=30, taste=direction())
    found = judged(replace(people, rated_up=np.full(30, label)))
    assert not found.passes and found.p > 0.9


def test_a_single_verdict_is_judged_without_a_crash():
    found = judged(feedback(pairs=1))
    assert (found.n, found.accuracy, found.p, found.z) == (1, 0.5, 1.0, 0.0)
    assert found.more_rows() is None


def test_copies_of_one_prompt_do_not_count_as_held_out():
    """The same pair forty times under one prompt predicts itself perfectly, if folds let it."""
    people = feedback(pairs=1)
    copies = replace(
        people,
        **{name: np.repeat(getattr(people, name), 40, axis=0) for name in ("chosen", "rejected", "pair_features")},
        pair_weight=np.ones(40, np.float32),
        pair_group=np.zeros(40, np.int64),
    )
    assert judged(copies).accuracy == 0.5
    spread = replace(copies, pair_group=np.arange(40))
    assert judged(spread).accuracy == 1.0


def test_the_verdict_is_deterministic():
    people = feedback(pairs=20, ratings=10, taste=direction(size=1.0))
    assert judged(people) == judged(people)


def test_rows_that_are_missing_grow_with_the_square_of_the_missing_z():
    evidence = HeldOut(accuracy=0.6, ci_low=0.4, ci_high=0.8, p=0.2, n=20, z=1.15)
    assert evidence.more_rows() == 60  # twice the z needs four times the rows
    assert replace(evidence, z=2.4).more_rows() == 1
    assert replace(evidence, z=0.1).more_rows() is None
    assert not evidence.passes and replace(evidence, p=GATE_P).passes


class TestReliability:
    def of(self, people) -> float:
        contrasts = draw_contrasts(people, np.full(people.k, 0.4, np.float32), config=CONFIG, seed=0)
        return split_half_reliability(people, contrasts, config=CONFIG, seed=0)

    def test_is_near_zero_for_chance(self):
        assert np.mean([self.of(feedback(pairs=40, k=64, seed=i)) for i in range(12)]) < 0.2

    def test_is_near_one_for_a_strong_taste(self):
        assert self.of(feedback(pairs=200, taste=direction())) > 0.9
        assert self.of(feedback(ratings=300, taste=direction())) > 0.8

    def test_grows_with_evidence(self):
        few, many = (
            np.mean([self.of(feedback(pairs=n, taste=direction(size=1.0), noise=2.0, seed=i)) for i in range(6)])
            for n in (12, 120)
        )
        assert few < many - 0.1

    def test_of_under_four_prompts_is_zero(self):
        assert self.of(feedback(pairs=30, per_prompt=10, taste=direction())) == 0.0


class TestTheHead:
    def earned(self, people) -> bool:
        return earns_head(people, draw_contrasts(people, VARIANCE, config=CONFIG, seed=0), config=CONFIG)

    def test_is_earned_by_a_taste_that_turns_with_the_prompt(self):
        head = np.zeros((8, 4))
        head[:, 2] = direction(size=4.0)
        assert self.earned(feedback(pairs=200, head=head, noise=0.5))

    def test_is_not_earned_by_a_constant_taste_or_none(self):
        assert not any(self.earned(feedback(pairs=80, taste=direction(), seed=i)) for i in range(4))
        assert sum(self.earned(feedback(pairs=80, seed=i)) for i in range(8)) <= 1

    def test_is_not_tried_on_few_rows_or_ratings_alone(self):
        assert not self.earned(feedback(pairs=12, taste=direction()))
        assert not self.earned(feedback(ratings=100, taste=direction()))
