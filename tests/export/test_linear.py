"""The linear recipe finds a planted structure, and its parts are the textbook's."""

import numpy as np
import pytest
from reference import naive_linear as naive

from edge_align_export.linear import (
    _project,
    LinearPack,
    ridge_regression,
    solve,
    VARIANCE_FLOOR,
    within,
)

N_PROMPTS, EACH, RANK, N_FEATURE, WIDTH, N_LAYER = 60, 6, 4, 30, 12, 6
LAYERS = range(2, 5)


@pytest.fixture(scope="module")
def planted() -> dict[str, np.ndarray]:
    """Answers differ within a prompt along RANK styles; prompts shift everything along other directions."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(N_PROMPTS), EACH)
    styles = rng.normal(size=(len(groups), RANK))
    styles -= naive_mean(styles, groups)
    topic = rng.normal(size=(N_PROMPTS, 5))
    into_features, into_deep = rng.normal(size=(RANK, N_FEATURE)), rng.normal(size=(RANK, len(LAYERS) * WIDTH))
    by_topic = (topic @ rng.normal(size=(5, N_FEATURE)) * 3)[groups]
    features = styles @ into_features + by_topic
    deep = styles @ into_deep + (topic @ rng.normal(size=(5, len(LAYERS) * WIDTH)) * 3)[groups]
    return {
        "groups": groups,
        "styles": styles,
        "into_deep": into_deep,
        "prompt_features": (topic @ rng.normal(size=(5, 8)) + 0.1 * rng.normal(size=(N_PROMPTS, 8))).astype(np.float32),
        "features": (features + 0.3 * rng.normal(size=features.shape) + 2).astype(np.float32),
        "deep": (deep + 0.3 * rng.normal(size=deep.shape)).reshape(len(groups), len(LAYERS), WIDTH).astype(np.float32),
    }


def naive_mean(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    return np.asarray(values - naive.within(values, groups))


@pytest.fixture(scope="module")
def pack(planted) -> LinearPack:
    names = ("features", "deep", "groups", "prompt_features")
    return solve(
        **{name: planted[name] for name in names}, layers=LAYERS, n_layer=N_LAYER, k=RANK, ridge=0.01, inputs=3
    )


def test_subtracting_group_means_is_the_textbooks():
    rng = np.random.default_rng(1)
    values, groups = rng.normal(size=(40, 3)), rng.integers(0, 9, 40)
    np.testing.assert_allclose(within(values, groups), naive.within(values, groups), atol=1e-6)


@pytest.mark.parametrize("penalty", [0.0, 0.05, 2.0])
def test_ridge_regression_is_least_squares_on_augmented_data(penalty):
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(50, 6)) * [1, 10, 0.1, 1, 3, 1], rng.normal(size=(50, 2))
    np.testing.assert_allclose(ridge_regression(x, y, penalty), naive.ridge(x, y, penalty), rtol=1e-4, atol=1e-6)


def test_the_readout_recovers_the_planted_styles(planted, pack):
    read = within((planted["features"] - pack.feature_mean) @ pack.readout, planted["groups"])
    assert naive.canonical_correlations(read, planted["styles"]).min() > 0.98
    np.testing.assert_allclose(read, pack.latents, atol=1e-3)
    shuffled = np.random.default_rng(0).permutation(planted["styles"])
    assert naive.canonical_correlations(read, shuffled).max() < 0.4  # what chance gives


def test_latents_are_uncorrelated_and_their_variance_is_the_spread_of_the_fitted_activations(planted, pack):
    """In proportion to the singular values of the textbook's fitted values, of mean variance 1, largest first."""
    covariance = pack.latents.T @ pack.latents / len(pack.latents)
    np.testing.assert_allclose(covariance, np.diag(np.diag(covariance)), atol=1e-3)
    f = naive.within(planted["features"], planted["groups"])
    deep = naive.within(planted["deep"].reshape(len(f), -1), planted["groups"]).reshape(planted["deep"].shape)
    target = (deep / np.sqrt((deep**2).mean((0, 2)))[:, None]).reshape(len(f), -1)
    values = np.linalg.svd(f @ naive.ridge(f, target, 0.01), compute_uv=False)[:RANK]
    assert values[0] > 1.3 * values[-1]
    np.testing.assert_allclose(np.diag(covariance), values / values.mean(), rtol=1e-2)
    np.testing.assert_allclose(pack.spread, np.sqrt(values / values.mean()), rtol=1e-2)


def test_the_decoder_spans_the_planted_directions_on_the_layers_that_are_steered(planted, pack):
    steered = pack.decoder[:, list(LAYERS)].reshape(RANK, -1).astype(np.float64)
    rest = [layer for layer in range(N_LAYER) if layer not in LAYERS]
    assert pack.decoder.shape == (RANK, N_LAYER, WIDTH) and not pack.decoder[:, rest].any()
    planes = (np.linalg.qr(rows.T)[0] for rows in (steered, planted["into_deep"]))
    first, second = planes
    assert np.linalg.svd(first.T @ second, compute_uv=False).min() > 0.98  # cosines of the angles between them


def test_a_latent_decodes_to_its_covariance_with_the_deep_activations(planted, pack):
    """To steer along the weights of a taste is to add what the activations share with it."""
    deep = naive.within(planted["deep"].reshape(len(planted["groups"]), -1), planted["groups"])
    for j in range(RANK):
        shared = np.mean([z[j] * row for z, row in zip(pack.latents, deep, strict=True)], axis=0)
        np.testing.assert_allclose(pack.decoder[j, list(LAYERS)].ravel(), shared, atol=0.01 * np.abs(shared).max())


def test_little_noise_is_a_high_r2_and_a_variance_at_its_floor(pack):
    assert pack.r2 > 0.95
    np.testing.assert_allclose(pack.variance, VARIANCE_FLOOR * pack.latents.var(0), rtol=1e-3)


def test_features_that_say_nothing_give_an_r2_of_nothing_and_a_wide_posterior(planted):
    noise = np.random.default_rng(3).normal(size=planted["features"].shape).astype(np.float32)
    parts = {name: planted[name] for name in ("deep", "groups", "prompt_features")}
    pack = solve(features=noise, **parts, layers=LAYERS, n_layer=N_LAYER, k=RANK, ridge=0.3, inputs=3)
    assert pack.r2 < 0.05 and (pack.variance / pack.latents.var(0)).min() > 0.5


def test_the_baseline_predicts_the_mean_latent_of_a_prompt(planted, pack):
    described = np.concatenate([planted["prompt_features"], np.ones((N_PROMPTS, 1))], 1)
    raw = (planted["features"] - pack.feature_mean) @ pack.readout
    means = np.stack([raw[planted["groups"] == g].mean(0) for g in range(N_PROMPTS)])
    left = means - described @ pack.baseline
    assert (left**2).sum() < 0.5 * ((means - means.mean(0)) ** 2).sum()  # ridge 1 on few prompts: half is enough
    np.testing.assert_allclose(left.mean(0), 0, atol=1e-3)


def test_inputs_of_the_head_are_white_over_prompts(planted, pack):
    described = np.concatenate([planted["prompt_features"], np.ones((N_PROMPTS, 1))], 1)
    inputs = described @ pack.prompt_projection
    np.testing.assert_allclose(inputs.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(inputs.T @ inputs / N_PROMPTS, np.eye(3), atol=1e-3)


def test_fewer_prompts_than_head_inputs_leave_the_other_inputs_zero():
    """Four centred prompts span three directions; the whitened inputs have unit variance, the rest say nothing."""
    x = np.random.default_rng(0).normal(size=(4, 10)).astype(np.float32)
    projection = _project(x, 6)
    inputs = np.concatenate([x, np.ones((4, 1), np.float32)], 1) @ projection
    assert np.abs(inputs.T @ inputs / 4 - np.diag([1, 1, 1, 0, 0, 0])).max() < 1e-4
