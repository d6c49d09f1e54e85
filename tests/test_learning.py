"""From texts to latents, and from latents to what is known about a person."""

from dataclasses import replace

import numpy as np
import pytest
from reference import packs
from reference.people import cosine, direction, feedback
from reference.verdicts import TOPICS, verdict

from edge_align.bases import find_base
from edge_align.config import RuntimeConfig
from edge_align.encoder import PreferenceEncoder
from edge_align.features import AnswerEncoder, open_encoder, prompt_features
from edge_align.gguf_tensors import GGUFTensors
from edge_align.learning import calibrate, encode_dataset, learn, preference_accuracy
from edge_align.pack import LatentPack, load_pack
from edge_align.pairs import Dataset
from edge_align.records import PreferencePair, Rating, user_prompt

ONE = RuntimeConfig(n_threads=1)
K = 8


@pytest.fixture(scope="module")
def pack() -> LatentPack:
    """k = 8 latents and 4 inputs of the head; only what learning reads is meant to be real."""
    rng = np.random.default_rng(0)
    return LatentPack(
        manifest={"base_hash": packs.BASE_HASH},
        readout=np.zeros((5, K), np.float32),
        feature_mean=np.zeros(5, np.float32),
        baseline=np.zeros((3, K), np.float32),
        prompt_projection=np.zeros((3, 4), np.float32),
        variance=np.full(K, 0.4, np.float32),
        decoder=rng.normal(size=(K, 4, 6)).astype(np.float32) * [[[0], [1], [1], [1]]],
        metric=np.eye(K, dtype=np.float32),
        kl_curve=np.array([0, 1, 0], np.float32),
        hash="",
    )


class TestEncoding:
    pairs = tuple(
        PreferencePair(user_prompt(row["prompt"]), row["chosen"], row["rejected"], weight=2.0)
        for row in map(verdict, TOPICS[:3])
    )
    ratings = (
        Rating(pairs[0].prompt, pairs[0].chosen, True, 0.5),
        Rating(user_prompt("And snow?"), "Snow is cold.", False),
    )

    @pytest.fixture
    def real(self, built):
        return find_base(home=built[0]), load_pack(next(built[0].packs_dir.iterdir()))

    def test_gives_every_row_its_latent_centred_on_what_its_prompt_makes_likely(self, real, backend):
        base, pack = real
        told = []
        found = encode_dataset(base, pack, Dataset(self.pairs, self.ratings), runtime=ONE, tell=told.append)
        encoder, tensors = open_encoder(base.path), GGUFTensors(base.path)

        def latent(answer, prompt):
            z = pack.encode(encoder.encode([backend.tokenize(answer)]))[0]
            described = prompt_features(tensors, [backend.tokenize(prompt[-1].content)])
            return z - pack.expected(described)[0]

        tolerance = 0.02 if isinstance(encoder, AnswerEncoder) and encoder._model.dtype.itemsize == 4 else 0.2
        for i, pair in enumerate(self.pairs):
            np.testing.assert_allclose(found.chosen[i], latent(pair.chosen, pair.prompt), atol=tolerance)
            np.testing.assert_allclose(found.rejected[i], latent(pair.rejected, pair.prompt), atol=tolerance)
        np.testing.assert_array_equal(found.rated[0], found.chosen[0])  # the same text under the same prompt
        np.testing.assert_allclose(found.rated[1], latent("Snow is cold.", self.ratings[1].prompt), atol=tolerance)
        assert found.rated_up.tolist() == [True, False]
        assert found.pair_weight.tolist() == [2, 2, 2] and found.rated_weight.tolist() == [0.5, 1]
        assert found.pair_group.tolist() == [0, 1, 2] and found.rated_group.tolist() == [0, 3]
        assert found.pair_features.shape == (3, 16) and told[-1] == 1.0

    @pytest.mark.parametrize(("pairs", "ratings"), [(pairs, ()), ((), ratings)])
    def test_works_without_ratings_and_without_pairs(self, real, pairs, ratings):
        found = encode_dataset(*real, Dataset(pairs, ratings), runtime=ONE)
        assert found.chosen.shape == (len(pairs), real[1].k) and found.rated.shape == (len(ratings), real[1].k)
        assert found.rated_up.dtype == bool and found.chosen.dtype == np.float32


class TestLearning:
    def test_finds_a_constant_taste(self, pack):
        found = learn(pack, feedback(pairs=60, taste=direction()), seed=0)
        assert cosine(found.encoder.mean, direction()) > 0.9
        assert found.heldout.passes and found.reliability > 0.75
        assert not found.encoder.depends_on_prompt and found.latents.shape == (1, K)
        np.testing.assert_array_equal(found.latents[0], found.encoder.mean)
        assert found.encoder.scale == 1.0 and found.outside_support == 0.0

    def test_finds_a_taste_that_turns_with_the_prompt(self, pack):
        head = np.zeros((K, 4))
        head[:, 1] = direction(size=4.0)
        people = feedback(pairs=200, head=head, taste=direction(size=1.0, seed=2), noise=0.5)
        found = learn(pack, people, seed=0)
        assert found.encoder.depends_on_prompt and 2 <= len(found.latents) <= 64
        assert preference_accuracy(found.encoder, people)["accuracy"] > 0.85
        constant = replace(found.encoder, head_in=np.zeros((0, 4), np.float32), head_out=np.zeros((K, 0), np.float32))
        assert preference_accuracy(constant, people)["accuracy"] < 0.8

    def test_is_deterministic_by_seed(self, pack):
        people = feedback(pairs=30, ratings=10, taste=direction())
        first, again = learn(pack, people, seed=3), learn(pack, people, seed=3)
        np.testing.assert_array_equal(first.encoder.mean, again.encoder.mean)
        assert first.heldout == again.heldout
        assert not np.array_equal(first.encoder.mean, learn(pack, people, seed=4).encoder.mean)

    def test_counts_answers_unlike_any_the_pack_was_made_from(self, pack):
        people = feedback(pairs=10, taste=direction())
        far = people.chosen.copy()
        far[:5] *= 100
        assert learn(pack, replace(people, chosen=far), seed=0).outside_support == pytest.approx(5 / 20)


def test_calibration_gives_a_direction_the_share_of_the_budget_that_its_reliability_is(pack):
    """With metric I and curve ln KL = ln q the KL of a latent is |z|^2 / 2."""
    found = learn(pack, feedback(pairs=60, taste=direction()), seed=0)
    for reliability in (1.0, 0.5, 0.0):
        encoder, predicted = calibrate(pack, replace(found, reliability=reliability), kl_budget=0.4)
        assert predicted == pytest.approx(0.4 * reliability**0.5, rel=1e-4)
        assert float((encoder.latent() ** 2).sum() / 2) == pytest.approx(0.4 * reliability**0.5, rel=1e-4)


def test_preference_accuracy_counts_margins_and_gives_ties_half():
    people = feedback(pairs=4)
    people = replace(
        people,
        chosen=np.eye(4, K, dtype=np.float32) * [[1], [1], [1], [-1]],
        rejected=np.zeros((4, K), np.float32),
    )
    mean = np.array([1, 1, 0, 1, 0, 0, 0, 0], np.float32)  # right, right, a tie, wrong
    constant = PreferenceEncoder(mean, np.zeros((0, 4), np.float32), np.zeros((K, 0), np.float32), 1.0)
    found = preference_accuracy(constant, replace(people, chosen=people.chosen.astype(np.float32)))
    assert (found["accuracy"], found["n"]) == (2.5 / 4, 4)
    assert found["ci_low"] < 2.5 / 4 < found["ci_high"]
