"""The linear recipe finds a planted structure, and its parts are the textbook's."""

import numpy as np
import pytest
from reference import naive_linear as naive

from edge_align_export.linear import (
    _project,
    LinearPack,
    persistent,
    ridge_regression,
    solve,
    VARIANCE_FLOOR,
    within,
)

N_PROMPTS, EACH, RANK, N_FEATURE, WIDTH, N_LAYER = 60, 6, 4, 30, 12, 6
LAYERS = range(2, 5)
PERSISTS = np.array([0.9, 0.7, 0.5, 0.3])  # of each style from one half of an answer to the other


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
    kept = styles * np.sqrt(PERSISTS)
    halves = [kept + rng.normal(size=styles.shape) * np.sqrt(1 - PERSISTS) for _ in range(2)]
    deep = styles @ into_deep + (topic @ rng.normal(size=(5, len(LAYERS) * WIDTH)) * 3)[groups]
    return {
        "groups": groups,
        "styles": styles,
        "into_deep": into_deep,
        "prompt_features": (topic @ rng.normal(size=(5, 8)) + 0.1 * rng.normal(size=(N_PROMPTS, 8))).astype(np.float32),
        "halves": tuple((half @ into_features + by_topic + 2).astype(np.float32) for half in halves),
        "features": (features + 0.3 * rng.normal(size=features.shape) + 2).astype(np.float32),
        "deep": (deep + 0.3 * rng.normal(size=deep.shape)).reshape(len(groups), len(LAYERS), WIDTH).astype(np.float32),
    }


def naive_mean(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    return np.asarray(values - naive.within(values, groups))


@pytest.fixture(scope="module")
def pack(planted) -> LinearPack:
    names = ("features", "halves", "deep", "groups", "prompt_features")
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


def test_a_latents_variance_is_what_persists_of_it_within_an_answer(planted, pack):
    """Uncorrelated, of mean variance 1, in the proportions that were planted; the most lasting style comes first."""
    covariance = pack.latents.T @ pack.latents / len(pack.latents)
    np.testing.assert_allclose(covariance, np.diag(np.diag(covariance)), atol=1e-3)
    np.testing.assert_allclose(np.diag(covariance), PERSISTS / PERSISTS.mean(), atol=0.25)
    np.testing.assert_allclose(pack.persistence, PERSISTS, atol=0.15)
    for j in range(RANK):
        found = [abs(np.corrcoef(pack.latents[:, j], style)[0, 1]) for style in planted["styles"].T]
        assert int(np.argmax(found)) == j


def test_halves_that_share_nothing_leave_the_latents_alike(planted):
    noise = np.random.default_rng(5).normal(size=(2, *planted["features"].shape)).astype(np.float32)
    halves = (noise[0], noise[1])
    read = np.eye(N_FEATURE)[:, :3]
    values, _, spread = persistent(read, halves, planted["groups"])
    assert np.abs(values).max() < 0.3
    same = persistent(read, (noise[0], -noise[0]), planted["groups"])
    assert (same[0] < 0).all()  # halves that are opposites: nothing persists, and nothing is preferred
    np.testing.assert_array_equal(same[2], 1)
    np.testing.assert_allclose((spread**2).mean(), 1)


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
    pack = solve(
        features=noise, halves=(noise, noise), **parts, layers=LAYERS, n_layer=N_LAYER, k=RANK, ridge=0.3, inputs=3
    )
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
    projection = _project(x, 6, 11)
    inputs = np.concatenate([x, np.ones((4, 1), np.float32)], 1) @ projection
    assert np.abs(inputs.T @ inputs / 4 - np.diag([1, 1, 1, 0, 0, 0])).max() < 1e-4
