import numpy as np
import pytest

from edge_align.config import RuntimeConfig, SamplingConfig
from edge_align.errors import ContextOverflow, InputError, SessionClosed
from edge_align.records import Completion, join_chunks, SteeringVectors, user_prompt
from edge_align.runtime.base import Backend
from edge_align.runtime.fake import END, FakeBackend, START

GREEDY = SamplingConfig(temperature=0.0, max_tokens=30)


def answer(backend: Backend, vectors: SteeringVectors | None = None, sampling: SamplingConfig = GREEDY) -> Completion:
    return join_chunks(list(backend.generate(backend.render(user_prompt("hi")), vectors=vectors, sampling=sampling)))


def random_vectors(factor: float) -> SteeringVectors:
    array = np.random.default_rng(0).normal(size=(4, 16)) * factor
    array[0] = 0
    return SteeringVectors(array)


def test_zero_vectors_are_the_base_and_others_are_not() -> None:
    backend = FakeBackend()
    assert answer(backend).tokens == answer(backend, random_vectors(0)).tokens
    assert answer(backend).tokens != answer(backend, random_vectors(20)).tokens


def test_logits_move_linearly_with_the_vectors() -> None:
    backend = FakeBackend()
    base, once, twice = (
        backend.score([65], [[66, 67]], vectors=v)[0] for v in (None, random_vectors(1), random_vectors(2))
    )
    np.testing.assert_allclose(twice - base, 2 * (once - base), atol=1e-4)
    assert base.shape == (2, 258)


def test_greedy_answers_follow_the_scores() -> None:
    backend = FakeBackend()
    prompt = backend.render(user_prompt("hi"))
    tokens = answer(backend).tokens
    (scores,) = backend.score(prompt, [tokens], vectors=None)
    assert scores.argmax(1).tolist() == [*tokens]


def test_a_seed_fixes_the_answer_and_rows_count_seeds_up() -> None:
    backend, sampling = FakeBackend(), SamplingConfig(max_tokens=20, seed=5)
    prompt = backend.render(user_prompt("hi"))
    rows = backend.generate_batch([prompt, prompt], vectors=None, sampling=sampling)
    assert rows[0].tokens == answer(backend, None, sampling).tokens
    assert rows[1].tokens == answer(backend, None, SamplingConfig(max_tokens=20, seed=6)).tokens != rows[0].tokens


def test_cancelling_stop_strings_and_limits_end_an_answer() -> None:
    backend = FakeBackend(config=RuntimeConfig(n_ctx=64))
    calls = iter([False, False, False, True])
    chunks = list(backend.generate([65], vectors=None, sampling=GREEDY, cancelled=lambda: next(calls)))
    assert join_chunks(chunks).finish_reason == "cancelled" and len(join_chunks(chunks).tokens) == 3
    text = answer(backend).text
    stopped = answer(backend, sampling=SamplingConfig(temperature=0.0, stop=(text[4:7],)))
    assert stopped.text == text[: text.find(text[4:7])] and stopped.finish_reason == "stop"
    full = join_chunks(list(backend.generate([65] * 60, vectors=None, sampling=GREEDY)))
    assert (full.finish_reason, len(full.tokens)) in [("length", 5)] or full.finish_reason == "stop"
    with pytest.raises(ContextOverflow, match="65.*64"):
        backend.generate([65] * 65, vectors=None, sampling=GREEDY)


def test_control_tokens_are_parsed_only_when_asked_for() -> None:
    backend = FakeBackend()
    assert backend.tokenize("a<|end|>b", special=True) == [97, END, 98]
    assert backend.render(user_prompt("<|end|>")).count(END) == 1
    assert backend.detokenize([START, 97, END]) == "a"


def test_misuse_raises_our_errors() -> None:
    backend = FakeBackend()
    with pytest.raises(InputError, match="shape"):
        backend.generate([1], vectors=SteeringVectors(np.zeros((2, 2))), sampling=GREEDY)
    with pytest.raises(InputError, match="vocabulary"):
        backend.detokenize([999])
    backend.close()
    backend.close()
    with pytest.raises(SessionClosed):
        backend.tokenize("a")
