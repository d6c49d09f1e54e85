"""The Fisher metric and the measured KL on a model whose logits are linear in the steering vectors."""

import numpy as np
import pytest

from edge_align.kl import log_softmax, measured_kl, open_probe
from edge_align.records import SteeringVectors
from edge_align_export.metric import fisher_metric, TOP

K, N_LAYER, WIDTH = 3, 2, 5


class LinearSoftmax:
    """Logits at a position: a row of its own, plus a fixed matrix times the steering vectors."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.rows = rng.normal(size=(40, TOP)) * 1.5
        self.slope = rng.normal(size=(TOP, N_LAYER * WIDTH))

    def logits(self, token: int, vectors: SteeringVectors | None) -> np.ndarray:
        moved = 0 if vectors is None else self.slope @ vectors.array.ravel().astype(np.float64)
        return np.asarray(self.rows[token] + moved)

    def score_many(self, prompts, completions, *, vectors) -> list[np.ndarray]:
        return [np.stack([self.logits(t, vectors) for t in tokens]).astype(np.float32) for tokens in completions]


MODEL = LinearSoftmax()
PROMPTS, ANSWERS = [[1], [2]], [[3, 9, 30], [7, 8]]
DECODER = np.random.default_rng(1).normal(size=(K, N_LAYER, WIDTH)) * 0.3
DECODER[:, 0] = 0


def decode(z: np.ndarray) -> SteeringVectors:
    return SteeringVectors(np.tensordot(z, DECODER, axes=1))


def probabilities(logits: np.ndarray) -> np.ndarray:
    p = np.exp(logits - logits.max())
    return np.asarray(p / p.sum())


@pytest.fixture
def probe():
    return open_probe(MODEL, PROMPTS, ANSWERS)


@pytest.fixture
def closed_form() -> np.ndarray:
    """F = mean over positions of J' (diag p - p p') J, J the slope of the logits along the latents."""
    j = MODEL.slope @ DECODER.reshape(K, -1).T
    found = []
    for token in [t for answer in ANSWERS for t in answer]:
        p = probabilities(MODEL.logits(token, None))
        found.append(j.T @ (np.diag(p) - np.outer(p, p)) @ j)
    return np.asarray(np.mean(found, 0))


def test_the_metric_is_the_closed_form(probe, closed_form):
    told = []
    metric = fisher_metric(MODEL, probe, decode, k=K, step=0.01, tell=told.append)
    np.testing.assert_allclose(metric, closed_form, rtol=0.02, atol=0.02 * np.abs(closed_form).max())
    assert told == pytest.approx([1 / 3, 2 / 3, 1])
    assert np.linalg.eigvalsh(metric).min() > 0


def test_measured_kl_is_that_of_the_definition(probe):
    vectors = decode(np.array([0.5, -1, 0.2]))
    found = []
    for token in [t for answer in ANSWERS for t in answer]:
        p, q = probabilities(MODEL.logits(token, None)), probabilities(MODEL.logits(token, vectors))
        found.append(sum(a * np.log(a / b) for a, b in zip(p, q, strict=True)))
    assert measured_kl(MODEL, probe, vectors) == pytest.approx(np.mean(found), rel=1e-4)


def test_small_steps_cost_half_the_quadratic_form(probe, closed_form):
    z = np.array([0.03, 0.01, -0.02])
    assert measured_kl(MODEL, probe, decode(z)) == pytest.approx(0.5 * z @ closed_form @ z, rel=0.05)


def test_no_steering_costs_nothing(probe):
    assert measured_kl(MODEL, probe, decode(np.zeros(K))) == pytest.approx(0, abs=1e-7)


def test_log_softmax_survives_large_logits():
    got = log_softmax(np.array([[1000.0, 1000.0], [-1e4, 0.0]]))
    np.testing.assert_allclose(got, [[-np.log(2), -np.log(2)], [-1e4, 0]], rtol=1e-6)
