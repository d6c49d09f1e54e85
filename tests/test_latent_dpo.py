"""Latent DPO against its formulas (tests/reference/naive_latent_dpo.py) and its own laws."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from reference import naive_latent_dpo as naive
from reference.people import cosine, direction, feedback

from edge_align.latent_dpo import (
    balance,
    clip_norm,
    Contrasts,
    draw_contrasts,
    fit,
    fit_batch,
    fit_head,
    latent_dpo_loss,
    LatentDPOConfig,
    with_head,
)

CONFIG = LatentDPOConfig()
VARIANCE = np.full(8, 0.4, np.float32)
K = 8


def tensors(*arrays: np.ndarray) -> list[torch.Tensor]:
    return [torch.from_numpy(np.asarray(array, dtype=np.float64)) for array in arrays]


def fitted(people, **changes) -> np.ndarray:
    config = replace(CONFIG, **changes)
    return fit(draw_contrasts(people, VARIANCE, config=config, seed=0), people, config=config)


class TestTheLoss:
    rng = np.random.default_rng(3)
    mu = rng.normal(size=K)
    better, worse = rng.normal(size=(2, 5, 4, K)) * 2
    rated = rng.normal(size=(6, K)) * 2 + 0.5
    weight = np.array([1.0, -2.0, 0.5, 1.0, -0.3])
    up, down = np.array([1.0, 0, 0.7, 0, 1, 0]), np.array([0, 1.0, 0, 0.4, 0, 1])

    def loss(self, theta: torch.Tensor, *, pairs: bool = True, ratings: bool = True) -> torch.Tensor:
        rows, rated = tensors(self.better - self.worse, self.rated[:, None])
        weight, up, down = tensors(self.weight[None], self.up[None], self.down[None])
        contrasts = Contrasts(rows if pairs else rows[:0], rated if ratings else rated[:0])
        if not pairs:
            weight = weight[:, :0]
        if not ratings:
            up, down = up[:, :0], down[:, :0]
        return latent_dpo_loss(theta, contrasts, weight, up, down, 0.1)

    def naive(self, mu: np.ndarray, *, pairs: bool = True, ratings: bool = True, zero: float | None = None) -> float:
        total = naive.pair_loss(mu, self.better, self.worse, self.weight, 0.1) if pairs else 0.0
        if ratings:
            # the mean runs over the rated answers that are trained on; weights below 1 count in part
            seen = np.minimum(self.up + self.down, 1)
            mean = (seen * (0.1 * self.rated @ mu)).sum() / max(1, seen.sum())
            zero = max(0.0, mean) if zero is None else zero
            total += naive.rating_loss(mu, self.rated, self.up, self.down, 0.1, zero=zero)
        return total

    @pytest.mark.parametrize(("pairs", "ratings"), [(True, False), (False, True), (True, True)])
    def test_is_that_of_the_formulas(self, pairs, ratings):
        for mu in (self.mu, -self.mu, 0 * self.mu):
            got = self.loss(*tensors(mu[None]), pairs=pairs, ratings=ratings)
            assert float(got) == pytest.approx(self.naive(mu, pairs=pairs, ratings=ratings), rel=1e-10)

    def test_of_nothing_is_zero(self):
        assert float(self.loss(*tensors(self.mu[None]), pairs=False, ratings=False)) == 0.0

    def test_at_the_prior_is_log_two_per_pair_and_one_per_rating(self):
        expected = np.log(2) * np.abs(self.weight).sum() + (self.up + self.down).sum()
        assert float(self.loss(torch.zeros(1, K, dtype=torch.float64))) == pytest.approx(expected)

    def test_has_the_gradient_of_finite_differences_with_the_reference_point_held(self):
        theta = torch.tensor(self.mu[None], requires_grad=True)
        (gradient,) = torch.autograd.grad(self.loss(theta).sum(), theta)
        seen = np.minimum(self.up + self.down, 1)
        zero = max(0.0, (seen * (0.1 * self.rated @ self.mu)).sum() / seen.sum())
        for j in range(K):
            step = 1e-5 * np.eye(K)[j]
            slope = (self.naive(self.mu + step, zero=zero) - self.naive(self.mu - step, zero=zero)) / 2e-5
            assert float(gradient[0, j]) == pytest.approx(slope, rel=1e-5, abs=1e-8)

    def test_of_two_policies_at_once_is_the_loss_of_each(self):
        rows, rated = tensors(self.better - self.worse, self.rated[:, None])
        theta = torch.tensor(np.stack([self.mu, 2 * self.mu[::-1]]))
        weight = torch.tensor(np.stack([self.weight, np.abs(self.weight)]))
        up, down = torch.tensor(np.stack([self.up, self.down])), torch.tensor(np.stack([self.down, self.up]))
        both = latent_dpo_loss(theta, Contrasts(rows, rated), weight, up, down, 0.1)
        for i in range(2):
            row = slice(i, i + 1)
            alone = latent_dpo_loss(theta[row], Contrasts(rows, rated), weight[row], up[row], down[row], 0.1)
            assert float(both[i]) == pytest.approx(float(alone[0]), rel=1e-12)


def test_balanced_weights_of_ups_and_downs_have_the_same_sum_and_the_same_total():
    labels = torch.tensor([[True, True, True, False], [True, True, True, True]])
    weight = torch.tensor([[1.0, 1, 1, 1], [1, 1, 1, 1]])
    up, down = balance(labels, weight)
    assert up.sum(1).tolist() == [2.0, 4.0] and down.sum(1).tolist() == [2.0, 0.0]  # one side alone stays as it is
    assert (up[0, 3], down[0, 0]) == (0, 0)


class TestTheDraws:
    def test_agree_in_expectation_with_sampling_every_coordinate(self):
        """Means over 300 draws of one pair each, compared at five standard errors; the spread shows what is gained."""
        rng = np.random.default_rng(0)
        chosen, rejected = np.array([[0.8, -0.3, 0.1], [-0.4, 0.5, 0.6]], np.float32)
        variance = np.array([0.3, 0.6, 0.2], np.float32)
        people = replace(feedback(pairs=1, k=3), chosen=chosen[None], rejected=rejected[None])
        config = replace(CONFIG, draws=4, contrasts=64)
        ours = np.stack(
            [draw_contrasts(people, variance, config=config, seed=i).pairs[0].mean(0).numpy() for i in range(600)]
        )
        plain = np.stack(
            [
                naive.draw_contrasts(
                    chosen, rejected, variance, draws=config.draws, share=config.evidence, rng=rng
                ).mean(0)
                for _ in range(300)
            ]
        )
        error = np.sqrt(ours.var(0) / len(ours) + plain.var(0) / len(plain))
        assert (np.abs(ours.mean(0) - plain.mean(0)) < 5 * error).all()
        assert (np.abs(ours.mean(0)) > 5 * error).any(), "the comparison could not tell anything from zero"

    def test_lie_on_the_side_of_the_chosen_answer(self):
        people = feedback(pairs=6, taste=direction())
        z = draw_contrasts(people, VARIANCE, config=CONFIG, seed=1).pairs.numpy()
        side = np.einsum("nsk,nk->ns", z, (people.chosen - people.rejected) / VARIANCE)
        assert (side > 0).all()

    def test_are_the_same_for_the_same_seed_only(self):
        people = feedback(pairs=4)
        first, again, other = (draw_contrasts(people, VARIANCE, config=CONFIG, seed=s).pairs for s in (5, 5, 6))
        assert torch.equal(first, again) and not torch.equal(first, other)

    def test_of_two_equal_latents_are_finite(self):
        people = feedback(pairs=3)
        people = replace(people, rejected=people.chosen.copy())
        assert draw_contrasts(people, VARIANCE, config=CONFIG, seed=0).pairs.isfinite().all()


class TestTheFit:
    def test_reaches_the_optimum_that_newton_finds(self):
        people = feedback(pairs=60, taste=direction())
        contrasts = draw_contrasts(people, VARIANCE, config=CONFIG, seed=0)
        best = naive.optimum(
            contrasts.pairs.numpy(), people.pair_weight, beta=CONFIG.beta, ridge=CONFIG.prior_precision * CONFIG.beta**2
        )
        mine = fit(contrasts, people, config=replace(CONFIG, max_norm=1e9))
        assert np.linalg.norm(mine - best) < 0.01 * np.linalg.norm(best)

    def test_of_many_versions_at_once_is_that_of_each_alone(self):
        people = feedback(pairs=20, ratings=12, taste=direction())
        contrasts = draw_contrasts(people, VARIANCE, config=CONFIG, seed=0)
        rng = np.random.default_rng(0)
        weight = torch.tensor(rng.choice([-1.0, 0, 1], size=(5, 20)), dtype=torch.float32)
        weight[:, 0] = 1.0  # the step depends on the heaviest row
        labels = torch.tensor(rng.random((5, 12)) < 0.5)
        labels[:, :6], labels[:, 6:] = True, False
        rated = torch.ones(5, 12)
        many = fit_batch(contrasts, weight, labels, rated, k=K, config=CONFIG)
        for i in range(5):
            row = slice(i, i + 1)
            alone = fit_batch(contrasts, weight[row], labels[row], rated[row], k=K, config=CONFIG)
            torch.testing.assert_close(many[row], alone, rtol=1e-4, atol=1e-6)

    def test_with_every_label_flipped_is_the_negative(self):
        people = feedback(pairs=30, taste=direction())
        contrasts = draw_contrasts(people, VARIANCE, config=CONFIG, seed=0)
        flipped = replace(people, pair_weight=-people.pair_weight)
        np.testing.assert_allclose(
            fit(contrasts, flipped, config=CONFIG), -fit(contrasts, people, config=CONFIG), atol=1e-6
        )
        swapped = replace(people, chosen=people.rejected, rejected=people.chosen)  # with draws of its own
        assert cosine(fitted(swapped), fitted(people)) < -0.95

    @pytest.mark.parametrize(("pairs", "ratings"), [(0, 0), (60, 0), (0, 60), (40, 40)])
    def test_works_from_pairs_ratings_both_or_neither(self, pairs, ratings):
        mean = fitted(feedback(pairs=pairs, ratings=ratings, taste=direction()))
        assert mean.shape == (K,) and mean.dtype == np.float32
        if pairs or ratings:
            assert cosine(mean, direction()) > 0.8
        else:
            assert not mean.any()

    def test_without_weight_stays_at_the_prior(self):
        people = feedback(pairs=10, ratings=10, taste=direction())
        none = replace(people, pair_weight=0 * people.pair_weight, rated_weight=0 * people.rated_weight)
        assert not fitted(none).any()

    def test_is_deterministic(self):
        people = feedback(pairs=20, ratings=20, taste=direction())
        np.testing.assert_array_equal(fitted(people), fitted(people))

    def test_of_ten_pairs_lies_nearer_to_the_prior_than_that_of_two_hundred(self):
        few, many = (np.linalg.norm(fitted(feedback(pairs=n, taste=direction()), max_norm=1e9)) for n in (10, 200))
        assert 0 < few < 0.75 * many

    def test_is_clipped_to_the_largest_norm(self):
        people = feedback(pairs=200, taste=direction(), noise=0.0)
        free, clipped = fitted(people, max_norm=1e9), fitted(people, max_norm=0.5)
        assert np.linalg.norm(free) > 0.5
        np.testing.assert_allclose(np.linalg.norm(clipped), 0.5, rtol=1e-5)
        assert cosine(free, clipped) > 0.99999
        np.testing.assert_array_equal(clip_norm(clipped, 1.0), clipped)

    def test_settles_with_pairs_and_far_away_ratings_together(self):
        """Ratings of answers all far from the prior curve the loss much more than the pairs do."""
        people = feedback(pairs=200, ratings=60, taste=direction())
        people = replace(people, rated=people.rated + np.float32(60) * direction(size=1.0, seed=1).astype(np.float32))
        contrasts = draw_contrasts(people, VARIANCE, config=CONFIG, seed=0)
        ends = []
        for steps in (400, 401):
            ends.append(fit(contrasts, people, config=replace(CONFIG, steps=steps, max_norm=1e9)))
        assert np.linalg.norm(ends[0] - ends[1]) < 1e-3 * np.linalg.norm(ends[1])


class TestThePromptHead:
    def test_contrasts_score_the_mean_plus_a_times_the_features(self):
        people = feedback(pairs=5, ratings=3, p=4)
        contrasts = draw_contrasts(people, VARIANCE, config=CONFIG, seed=0)
        rng = np.random.default_rng(0)
        mean, head = rng.normal(size=K), rng.normal(size=(K, 4))
        design = with_head(contrasts, people)
        theta = np.concatenate([mean, head.ravel()])
        for rows, wide, features in (
            (contrasts.pairs, design.pairs, people.pair_features),
            (contrasts.rated, design.rated, people.rated_features),
        ):
            expected = np.einsum("nsk,nk->ns", rows.numpy(), mean + features @ head.T)
            np.testing.assert_allclose(wide.numpy() @ theta, expected, rtol=1e-4, atol=1e-4)

    def test_of_low_rank_finds_a_taste_that_turns_with_the_prompt(self):
        head = np.zeros((K, 4))
        head[:, 1] = direction()
        people = feedback(pairs=300, head=head)
        contrasts = draw_contrasts(people, VARIANCE, config=CONFIG, seed=0)
        mean, into, out = fit_head(contrasts, people, config=CONFIG)
        assert into.shape == (CONFIG.head_rank, 4) and out.shape == (K, CONFIG.head_rank)
        assert cosine((out @ into).ravel(), head.ravel()) > 0.9
        assert np.linalg.norm(mean) < 0.5 * np.linalg.norm(out @ into)
