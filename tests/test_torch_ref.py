"""The PyTorch reference: equal to a Llama in plain numpy, close to llama.cpp on the real base."""

import numpy as np
import pytest
import torch
from reference import naive_llama as naive

from edge_align.bases import find_base
from edge_align.config import SamplingConfig
from edge_align.errors import BackendUnavailable, ModelLoadError
from edge_align.records import SteeringVectors, user_prompt
from edge_align.runtime.positions import PositionSums
from edge_align.runtime.torch_ref import LlamaReference
from edge_align.runtime.torch_rows import draw
from edge_align.runtime.torch_sample import sample, sample_and_read

GREEDY = SamplingConfig(temperature=0.0, max_tokens=6)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    weights = naive.write_tiny(path)
    return path, weights, LlamaReference(path)


def steering(seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(naive.LAYERS, naive.D)).astype(np.float32)
    vectors[0] = 0
    return vectors


class TestATinyModel:
    prompt, answer = [3, 7, 1, 12], [5, 5, 19, 0, 8]

    def test_has_the_logits_of_plain_numpy(self, tiny):
        _, weights, model = tiny
        expected = naive.logits(weights, [*self.prompt, *self.answer[:-1]])[3:]
        np.testing.assert_allclose(model.score(self.prompt, self.answer), expected, rtol=1e-4, atol=1e-4)

    def test_is_steered_from_the_last_prompt_token_on(self, tiny):
        _, weights, model = tiny
        text, vectors = [*self.prompt, *self.answer[:-1]], steering()
        got = model.score(self.prompt, self.answer, vectors)
        expected = naive.logits(weights, text, vectors=vectors, steered_from=3)[3:]
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
        for other in (2, 4):
            assert np.abs(got - naive.logits(weights, text, vectors=vectors, steered_from=other)[3:]).max() > 0.01

    def test_decodes_greedily_what_plain_numpy_would(self, tiny):
        _, weights, model = tiny
        prompts = [[3, 7, 1, 12], [4], [9, 9]]
        for vectors in (None, steering()):
            answers = sample(model, prompts, sampling=GREEDY, eos=[], vectors=vectors)
            for prompt, answer in zip(prompts, answers, strict=True):
                text = list(prompt)
                for _ in range(GREEDY.max_tokens):
                    after = naive.logits(weights, text, vectors=vectors, steered_from=len(prompt) - 1)
                    text.append(int(after[-1].argmax()))
                assert answer == text[len(prompt) :]

    def test_gives_every_row_of_a_batch_its_own_vectors(self, tiny):
        model = tiny[2]
        rows = np.stack([steering(1), 0 * steering(), steering(2)])
        together = sample(model, [[3, 7]] * 3, sampling=GREEDY, eos=[], vectors=rows)
        alone = [sample(model, [[3, 7]], sampling=GREEDY, eos=[], vectors=row)[0] for row in rows]
        assert together == alone
        assert together[1] == sample(model, [[3, 7]], sampling=GREEDY, eos=[])[0] != together[0]

    def test_stops_after_an_end_token_and_keeps_it(self, tiny):
        model = tiny[2]
        free = sample(model, [[3, 7]], sampling=GREEDY, eos=[])[0]
        end = free[2]
        assert sample(model, [[3, 7]], sampling=GREEDY, eos=[end])[0] == free[: free.index(end) + 1]

    def test_reads_while_it_samples_what_a_second_pass_would(self, tiny):
        model, prompts = tiny[2], [[3, 7, 1, 12], [4], [3, 7, 1, 12]]
        drawn = SamplingConfig(max_tokens=6, seed=3)
        first = sample(model, prompts, sampling=drawn, eos=[])[0]
        end = next(token for token in first if token != first[0])
        read, again = PositionSums(6, 2, model.shape.d_model), PositionSums(6, 2, model.shape.d_model)
        answers, means = sample_and_read(model, prompts, layers=[1, 0], sampling=drawn, eos=[end], positions=read)
        kept = [answer[:-1] for answer in answers]  # an end token, or the last one before the cap: not passed through
        assert 0 < len(kept[0]) == first.index(end) < 5 == max(map(len, kept)) and all(kept)
        spans = [(len(prompt), len(prompt) + len(answer)) for prompt, answer in zip(prompts, kept, strict=True)]
        rows = [[*prompt, *answer] for prompt, answer in zip(prompts, kept, strict=True)]
        second = model.mean_hidden(rows, spans, [1, 0], positions=again)
        np.testing.assert_allclose(means, second, rtol=1e-4, atol=1e-5)
        assert again.counts.tolist() == [sum(len(answer) > i for answer in kept) for i in range(6)]
        np.testing.assert_array_equal(read.counts, again.counts)
        np.testing.assert_allclose(read.sums, again.sums, rtol=1e-4, atol=1e-5)
        lengths = np.array([len(answer) for answer in kept])
        np.testing.assert_allclose(again.sums.sum(0), (second * lengths[:, None, None]).sum(0), rtol=1e-4, atol=1e-4)

    def test_of_an_unknown_architecture_is_refused(self, tiny, monkeypatch):
        monkeypatch.setattr("edge_align.runtime.torch_ref.SUPPORTED", ("mamba",))
        with pytest.raises(BackendUnavailable, match="mamba"):
            LlamaReference(tiny[0])

    def test_that_is_cut_off_is_refused(self, tiny, tmp_path):
        cut = tmp_path / "cut.gguf"
        cut.write_bytes(tiny[0].read_bytes()[:-64])
        with pytest.raises(ModelLoadError):
            LlamaReference(cut)


class TestDrawing:
    logits = torch.tensor([[0.0, 3.0, 2.0, 1.0, -1.0]]).log_softmax(-1)

    def shares(self, **options) -> np.ndarray:
        rng = torch.Generator().manual_seed(0)
        drawn = draw(self.logits.expand(20_000, -1), SamplingConfig(**options), rng)
        return np.bincount(drawn.numpy(), minlength=5) / 20_000

    def test_follows_the_probabilities(self):
        np.testing.assert_allclose(self.shares(top_p=1.0), self.logits[0].exp(), atol=0.015)

    def test_keeps_the_top_k_then_the_smallest_set_of_mass_p(self):
        p = self.logits[0].exp().numpy()
        kept = p[[1, 2]] / p[[1, 2]].sum()
        for options in ({"top_k": 2, "top_p": 1.0}, {"top_p": 0.75}):
            found = self.shares(**options)
            np.testing.assert_allclose(found[[1, 2]], kept, atol=0.015)
            assert found[[0, 3, 4]].sum() == 0
        assert self.shares(top_p=0.0)[1] == 1 == self.shares(temperature=0.0)[1]


@pytest.fixture(scope="module")
def model(base_path) -> LlamaReference:
    return LlamaReference(base_path)


@pytest.fixture(scope="module")
def case(backend):
    prompt = backend.render(user_prompt("Why is the sky blue?"))
    answer = backend.tokenize(
        "The sky looks blue because air scatters short waves of light more than long ones. At sunset the light "
        "has a longer way to go, and what is left of it is red."
    )
    return prompt, answer


@pytest.fixture(scope="module")
def vectors() -> SteeringVectors:
    base = find_base()
    array = np.random.default_rng(1).normal(size=(base.n_layer, base.d_model)) * 0.6
    array[0] = 0
    return SteeringVectors(array)


@pytest.fixture(scope="module")
def scored(backend, model, case, vectors):
    """Log-probabilities (engine, steered) -> (T, n_vocab)."""
    prompt, answer = case

    def log_softmax(x):
        return torch.from_numpy(np.array(x)).double().log_softmax(-1).numpy()

    return {
        ("llama", False): log_softmax(backend.score(prompt, [answer], vectors=None)[0]),
        ("llama", True): log_softmax(backend.score(prompt, [answer], vectors=vectors)[0]),
        ("torch", False): log_softmax(model.score(prompt, answer)),
        ("torch", True): log_softmax(model.score(prompt, answer, vectors.array)),
    }


class TestTheRealBase:
    def test_is_predicted_like_llama_cpp_predicts_it(self, scored):
        """llama.cpp rounds activations to eight bits in every product of thirty blocks; PyTorch rounds nothing."""
        for steered in (False, True):
            ours, theirs = scored["torch", steered], scored["llama", steered]
            assert (ours.argmax(-1) == theirs.argmax(-1)).mean() >= 0.9
            kl = (np.exp(theirs) * (theirs - ours)).sum(-1)
            assert kl.mean() < 0.02

    def test_is_steered_like_llama_cpp_steers_it(self, scored):
        """The change of likely tokens' log-probabilities, which strong steering moves far more than rounding.

        Vectors one block too early or late correlate at about 0.8.
        """
        changes = {engine: scored[engine, True] - scored[engine, False] for engine in ("llama", "torch")}
        likely = np.argsort(scored["llama", False], axis=1)[:, -50:]
        ours, theirs = (np.take_along_axis(changes[engine], likely, 1).ravel() for engine in ("torch", "llama"))
        assert np.abs(theirs).mean() > 1.0
        assert np.corrcoef(ours, theirs)[0, 1] > 0.985
        assert np.polyfit(theirs, ours, 1)[0] == pytest.approx(1.0, abs=0.04)
