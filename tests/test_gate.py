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
    direction_reliability,
    earns_head,
    folds,
    GATE_P,
    HeldOut,
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
    def test_is_near_zero_for_chance(self):
        assert np.mean([direction_reliability(feedback(pairs=40, k=64, seed=i)) for i in range(12)]) < 0.2

    def test_is_near_one_for_a_strong_taste(self):
        assert direction_reliability(feedback(pairs=200, taste=direction())) > 0.9
        assert direction_reliability(feedback(ratings=300, taste=direction())) > 0.8

    @pytest.mark.parametrize("flip", [0.0, 0.25])
    @pytest.mark.parametrize("pairs", [20, 100])
    def test_is_the_squared_cosine_of_what_the_rows_say_with_the_taste_they_come_from(self, pairs, flip):
        taste, cosines, found = direction(k=32, size=1.0), [], []
        for seed in range(60):
            people = feedback(pairs=pairs, k=32, taste=taste, noise=1.5, seed=seed)
            wrong = np.random.default_rng(1000 + seed).random(pairs) < flip
            swapped = [
                np.where(wrong[:, None], b, a)
                for a, b in ((people.chosen, people.rejected), (people.rejected, people.chosen))
            ]
            people = replace(people, chosen=swapped[0], rejected=swapped[1])
            rows = people.chosen - people.rejected
            said = (rows / np.linalg.norm(rows, axis=1, keepdims=True) ** 0.5).sum(0)
            cosines.append(said @ taste / np.linalg.norm(said) / np.linalg.norm(taste))
            found.append(direction_reliability(people))
        assert np.mean(found) == pytest.approx(np.mean(np.square(cosines)), abs=0.06)

    def test_grows_with_evidence(self):
        few, many = (
            np.mean(
                [
                    direction_reliability(feedback(pairs=n, taste=direction(size=1.0), noise=2.0, seed=i))
                    for i in range(6)
                ]
            )
            for n in (12, 120)
        )
        assert few < many - 0.1

    def test_ratings_and_pairs_count_together_and_a_constant_in_all_rated_answers_does_not(self):
        names = ("rated", "rated_up", "rated_weight", "rated_features", "rated_group")
        found = []
        for seed in range(8):
            both = feedback(pairs=60, ratings=60, taste=direction(size=1.0), noise=2.0, seed=seed)
            pairs_alone = replace(both, **{name: getattr(both, name)[:0] for name in names})
            all_liked = replace(both, rated=both.rated + 5.0, rated_up=np.ones(60, bool))
            found.append([direction_reliability(given) for given in (both, pairs_alone, all_liked)])
        of_both, of_pairs, of_liked = np.mean(found, axis=0)
        assert of_both > of_pairs
        assert of_liked == pytest.approx(of_pairs, abs=0.02)

    def test_of_under_four_prompts_is_zero(self):
        assert direction_reliability(feedback(pairs=30, per_prompt=10, taste=direction())) == 0.0


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
