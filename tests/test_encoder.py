"""A preference encoder: its latent, and what it stores."""

import numpy as np
import pytest

from edge_align.encoder import PreferenceEncoder
from edge_align.errors import CorruptArtefact

MEAN = np.array([1, -2, 0.5], np.float32)
HEAD_IN = np.array([[1, 0], [0, 2]], np.float32)
HEAD_OUT = np.array([[1, 1], [0, 1], [0, 0]], np.float32)


@pytest.fixture
def constant() -> PreferenceEncoder:
    return PreferenceEncoder(MEAN, np.zeros((0, 2), np.float32), np.zeros((3, 0), np.float32), scale=0.5)


@pytest.fixture
def turning() -> PreferenceEncoder:
    return PreferenceEncoder(MEAN, HEAD_IN, HEAD_OUT, scale=0.5)


def test_a_constant_encoder_gives_its_scaled_mean_for_every_prompt(constant):
    assert not constant.depends_on_prompt and constant.k == 3
    for inputs in (None, np.ones(2, np.float32)):
        assert constant.latent(inputs).tolist() == [0.5, -1, 0.25]


def test_a_head_adds_a_times_the_features_of_the_prompt(turning):
    # mean + out @ (in @ (1, 3)) = (1, -2, .5) + (1 + 6, 6, 0), halved
    assert turning.depends_on_prompt
    assert turning.latent(np.array([1, 3], np.float32)).tolist() == [4, 2, 0.25]
    assert turning.latent().dtype == np.float32


def test_a_round_trip_through_tensors_changes_nothing(constant, turning):
    for encoder in (constant, turning):
        again = PreferenceEncoder.from_tensors(encoder.to_tensors())
        inputs = np.array([0.3, -1], np.float32)
        np.testing.assert_array_equal(again.latent(inputs), encoder.latent(inputs))
        assert again.depends_on_prompt == encoder.depends_on_prompt and again.scale == encoder.scale
    assert set(constant.to_tensors()) == {"mean", "scale"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mean": None, "extra": MEAN}, ["mean", "extra"]),
        ({"scale": MEAN}, ["one number"]),
        ({"mean": HEAD_IN}, ["not a vector", "do not fit"]),
        ({"head_in": None}, ["half a head"]),
        ({"head_out": HEAD_OUT[:2]}, ["do not fit"]),
        ({"mean": MEAN.astype(np.float64)}, ["float32"]),
    ],
)
def test_arrays_that_are_no_encoder_are_refused_with_every_reason(turning, changes, words):
    tensors = {k: v for k, v in (turning.to_tensors() | changes).items() if v is not None}
    with pytest.raises(CorruptArtefact) as caught:
        PreferenceEncoder.from_tensors(tensors)
    assert all(word in str(caught.value) for word in words)
