"""The passes of a recipe: whichever engine is faster here computes what llama.cpp does, row by row."""

from __future__ import annotations

import numpy as np
import pytest

from edge_align.bases import find_base
from edge_align.config import RuntimeConfig, SamplingConfig
from edge_align.records import SteeringVectors, user_prompt
from edge_align_export.passes import NativePasses, open_passes

QUESTIONS = ("Why is the sky blue?", "Name a fruit.", "How do I boil an egg without breaking it?")


@pytest.fixture(scope="module")
def base():
    return find_base()


@pytest.fixture(scope="module")
def native(base, backend):
    passes = NativePasses(base, backend, runtime=RuntimeConfig(n_threads=1, n_ctx=256))
    yield passes
    passes.close()


@pytest.fixture(scope="module")
def chosen(base, backend):
    return open_passes(base, backend, runtime=RuntimeConfig(n_threads=1, n_ctx=256))


def test_mean_activations_are_those_of_llama_cpp(backend, native, chosen):
    """To the rounding of bfloat16 and of 8-bit activations; a span one token off would be far outside."""
    prompts = [backend.render(user_prompt(text)) for text in QUESTIONS]
    answers = [
        backend.tokenize(text) for text in (" Because of scattering.", "Apple", "Put it in slowly, with a spoon.")
    ]
    rows = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    spans = [(len(prompt), len(row)) for prompt, row in zip(prompts, rows, strict=True)]
    theirs, ours = (passes.mean_hidden(rows, spans, [8, 20]) for passes in (native, chosen))
    assert ours.shape == theirs.shape == (3, 2, 576)
    moved = native.mean_hidden(rows, [(first - 1, last) for first, last in spans], [8, 20])
    error = np.linalg.norm(ours - theirs, axis=-1) / np.linalg.norm(theirs, axis=-1)
    assert error.max() < 0.1
    assert np.linalg.norm(moved - theirs, axis=-1).min() > np.linalg.norm(ours - theirs, axis=-1).max()


@pytest.mark.parametrize("which", ["native", "chosen"])
def test_every_row_is_steered_by_its_own_vectors(which, request, backend):
    passes = request.getfixturevalue(which)
    prompts = [backend.render(user_prompt(text)) for text in QUESTIONS]
    greedy = SamplingConfig(temperature=0.0, max_tokens=12)
    strong = np.zeros((30, 576), np.float32)
    strong[10:20] = np.random.default_rng(0).normal(size=576) * 2
    base = passes.sample(prompts, sampling=greedy)
    mixed = passes.sample(prompts, sampling=greedy, vectors=[None, SteeringVectors(strong), None])
    assert [mixed[0], mixed[2]] == [base[0], base[2]] and mixed[1] != base[1]
    assert all(0 < len(tokens) <= 12 for tokens in mixed)
