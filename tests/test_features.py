"""Features of answers and prompts: the same alone and in a batch, in float32 and bfloat16, in PyTorch and llama.cpp."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edge_align.features import (
    AnswerEncoder,
    LENGTH_WEIGHT,
    MAX_TOKENS,
    n_feature,
    NativeAnswerEncoder,
    open_encoder,
    pool,
    prompt_features,
)
from edge_align.gguf_tensors import GGUFTensors
from edge_align.runtime.torch_ref import LlamaReference
from edge_align.runtime.torch_rows import batches

D = 576  # of SmolLM2-135M


@pytest.fixture(scope="module")
def answers(backend) -> list[list[int]]:
    texts = (
        "Tea is a drink made from leaves.",
        "I love tea! I think you would love it too, my friend, and we could drink some together this afternoon.",
        "Yes.",
        "1. Boil water. 2. Warm the pot. 3. Add one spoon of leaves per person. 4. Wait four minutes. 5. Pour. " * 3,
    )
    return [backend.tokenize(text) for text in texts]


@pytest.fixture(scope="module")
def encoder(base_path) -> AnswerEncoder:
    return AnswerEncoder(base_path, bf16=False)


@pytest.fixture(scope="module")
def encoded(encoder, answers) -> np.ndarray:
    return encoder.encode(answers)


def relative(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Distance of each part (block means, spread) of each row, as a share of its norm: (n, 4)."""
    parts = [slice(i * D, (i + 1) * D) for i in range(3)]
    return np.stack([np.linalg.norm(a[:, p] - b[:, p], axis=1) / np.linalg.norm(b[:, p], axis=1) for p in parts], 1)


def test_an_answer_alone_has_the_features_it_has_in_a_batch(encoder, encoded, answers):
    for i, answer in enumerate(answers):
        np.testing.assert_allclose(encoder.encode([answer])[0], encoded[i], rtol=1e-3, atol=2e-4)
    assert encoded.shape == (4, n_feature(D)) == (4, 3 * D + 1) and encoded.dtype == np.float32


def test_the_order_of_answers_is_kept_and_progress_is_told(encoder, encoded, answers):
    told = []
    backwards = encoder.encode(answers[::-1], on_done=told.append)
    np.testing.assert_allclose(backwards[::-1], encoded, rtol=1e-3, atol=2e-4)
    assert told[-1] == 4 and told == sorted(told)


def test_features_are_means_and_a_root_mean_square_of_the_first_two_blocks(base_path, encoded, answers):
    with torch.inference_mode():
        _, blocks = LlamaReference(base_path, n_layer=2).hidden(torch.tensor([answers[1]]), layers=[0, 1])
    states = [block[0].numpy() for block in blocks]
    first = sum(states[0]) / len(answers[1])
    second = sum(states[1]) / len(answers[1])
    spread = np.sqrt(sum(x**2 for x in states[1]) / len(answers[1]))
    expected = np.concatenate([first, second, spread, [LENGTH_WEIGHT * math.log(len(answers[1]))]])
    np.testing.assert_allclose(encoded[1], expected, rtol=1e-3, atol=2e-4)
    np.testing.assert_allclose(pool(states), expected, rtol=1e-4, atol=1e-5)


def test_llama_cpp_gives_the_same_features_up_to_its_rounding(base_path, encoded, answers):
    """llama.cpp rounds activations to eight bits. Different answers are several times further apart."""
    native = NativeAnswerEncoder(base_path)
    told = []
    try:
        theirs = native.encode(answers, on_done=told.append)
    finally:
        native.close()
    assert relative(encoded, theirs).max() < 0.03 and told == [1, 2, 3, 4]
    np.testing.assert_allclose(encoded[:, -1], theirs[:, -1], rtol=1e-6)
    assert relative(encoded[:2], encoded[[1, 0]]).min() > 0.09


def test_bfloat16_is_close_to_float32(base_path, encoded, answers):
    fast = AnswerEncoder(base_path, bf16=True)
    assert fast.reason.startswith("bfloat16")
    assert relative(fast.encode(answers), encoded).max() < 0.02


def test_only_the_first_tokens_of_an_endless_answer_are_read(encoder, answers):
    endless = (answers[1] * 60)[: MAX_TOKENS + 40]
    assert len(endless) > MAX_TOKENS
    a, b = encoder.encode([endless, endless[:MAX_TOKENS]])
    np.testing.assert_array_equal(a, b)


def test_a_prompt_is_the_mean_of_its_token_embeddings(base_path):
    tensors = GGUFTensors(base_path)
    table = tensors.read("token_embd.weight")
    found = prompt_features(tensors, [[5, 900, 5], [77]])
    np.testing.assert_allclose(found[0], (2 * table[5] + table[900]) / 3, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found[1], table[77])
    assert found.dtype == np.float32


def test_an_architecture_pytorch_does_not_compute_goes_through_llama_cpp(base_path, monkeypatch):
    assert isinstance(open_encoder(base_path), AnswerEncoder)
    monkeypatch.setattr("edge_align.runtime.torch_ref.SUPPORTED", ("mamba",))
    other = open_encoder(base_path)
    assert isinstance(other, NativeAnswerEncoder) and "llama.cpp" in other.reason
    other.close()


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(50, 300))
def test_batches_hold_every_answer_once_in_order_and_within_the_budget(lengths, budget):
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    found = batches(order, lengths, budget)
    assert [i for rows in found for i in rows] == order
    assert all(len(rows) * max(lengths[i] for i in rows) <= budget for rows in found)
