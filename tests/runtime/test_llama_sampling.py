"""Forks of the llama.cpp engine, their prompt caches, and sampling under constraints, on the default base."""

import json
from itertools import zip_longest

import numpy as np
import pytest

from edge_align.config import SamplingConfig
from edge_align.errors import InputError, SessionClosed
from edge_align.records import join_chunks, user_prompt
from edge_align.runtime.base import Forking
from edge_align.runtime.llamacpp import PREFILL_CHUNK
from edge_align.server.grammar import grammar_of

GREEDY = SamplingConfig(temperature=0.0, max_tokens=12)


def answer(backend, prompt, vectors=None, **sampling):
    config = SamplingConfig(**{"temperature": 0.0, "max_tokens": 12, **sampling})
    return join_chunks(list(backend.generate(prompt, vectors=vectors, sampling=config)))


@pytest.fixture(scope="module")
def fork(backend):
    forked = backend.fork()
    yield forked
    forked.close()


def test_answers_that_take_turns_token_by_token_are_the_single_ones(backend, fork, vectors):
    assert isinstance(backend, Forking)
    prompts = [backend.render(user_prompt(q)) for q in ("Why is the sky blue?", "Name three birds.")]
    alone = [answer(backend, prompts[0]), answer(backend, prompts[1], vectors)]
    streams = [
        backend.generate(prompts[0], vectors=None, sampling=GREEDY),
        fork.generate(prompts[1], vectors=vectors, sampling=GREEDY),
    ]
    chunks = [*zip_longest(*streams)]
    together = [join_chunks([pair[i] for pair in chunks if pair[i] is not None]) for i in range(2)]
    assert [one.tokens for one in together] == [one.tokens for one in alone]
    assert alone[0].tokens != alone[1].tokens


def test_a_prompt_taken_over_from_another_fork_gives_the_same_logits_to_the_bit(backend, fork):
    prompt = backend.render(user_prompt("List these: " + ", ".join(f"word{i}" for i in range(60))))
    shared = prompt.index(2) + 1 + PREFILL_CHUNK  # the template's first turn, up to <|im_end|>, and a part of the next
    other = [*prompt[:shared], *backend.tokenize(" and then something else?")]
    cold = answer(backend, prompt, top_logprobs=0)
    held, data = backend.held.copy(), backend.save_prompt()
    assert len(held) == len(prompt) - 1 and 10_000 < len(data) / len(held) < 40_000
    for tokens in (prompt, other):
        fork.forget_prompt()
        assert fork.load_prompt(held, data)
        warm = answer(fork, tokens, top_logprobs=0)
        fresh = backend.fork()
        reference = answer(fresh, tokens, top_logprobs=0)
        fresh.close()
        assert warm.tokens == reference.tokens
        expected = len(prompt) - 1 if tokens is prompt else shared
        assert warm.stats.cached_tokens == expected and reference.stats.cached_tokens == 0
    assert answer(fork, prompt).tokens == cold.tokens


def test_data_that_is_no_cache_is_refused_and_leaves_an_empty_one(fork):
    assert not fork.load_prompt(np.arange(5, dtype=np.int32), b"\0" * 64)
    assert len(fork.held) == 0


def test_a_closed_fork_leaves_the_engine_and_a_closed_engine_closes_its_forks(base):
    from edge_align.config import RuntimeConfig
    from edge_align.runtime.llamacpp import LlamaCppBackend

    engine = LlamaCppBackend.open(base.path, config=RuntimeConfig(n_threads=1, n_ctx=64))
    first, second = engine.fork(), engine.fork()
    first.close()
    assert engine.tokenize("a")
    engine.close()
    with pytest.raises(SessionClosed):
        second.tokenize("a")


def test_logprobs_are_the_log_softmax_of_the_scored_logits(backend, vectors):
    prompt = backend.render(user_prompt("Why is the sky blue?"))
    chunks = list(
        backend.generate(
            prompt, vectors=vectors, sampling=SamplingConfig(temperature=0.0, max_tokens=6, top_logprobs=3)
        )
    )
    found = [one for chunk in chunks for one in chunk.logprobs]
    tokens = join_chunks(chunks).tokens
    assert tuple(one.token for one in found) == tokens
    (logits,) = backend.score(prompt, [tokens], vectors=vectors)
    expected = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum(1, keepdims=True))
    for one, row in zip(found, expected, strict=True):
        assert one.logprob == pytest.approx(row[one.token], abs=0.05)  # a batch adds floats in another order
        assert one.top[0] == (one.token, one.logprob)  # greedy
        assert [logprob for _, logprob in one.top] == pytest.approx(sorted(row)[::-1][:3], abs=0.05)


def test_a_bias_forces_and_forbids_tokens(backend):
    prompt = backend.render(user_prompt("Why is the sky blue?"))
    (word,) = backend.tokenize(" walrus")[:1]
    assert set(answer(backend, prompt, logit_bias=((word, 100.0),)).tokens) == {word}
    plain = answer(backend, prompt).tokens
    assert plain[0] not in answer(backend, prompt, logit_bias=((plain[0], -100.0),)).tokens
    assert answer(backend, prompt, logit_bias=((2**31 - 1, 5.0),)).tokens == plain  # no such token


def test_a_frequency_penalty_ends_a_repetition(backend):
    prompt = backend.render(user_prompt("Say yes."))
    (word,) = backend.tokenize(" yes")[:1]
    biased = answer(backend, prompt, logit_bias=((word, 20.0),), max_tokens=20).tokens
    calmer = answer(backend, prompt, logit_bias=((word, 20.0),), max_tokens=20, frequency_penalty=2.0).tokens
    assert biased.count(word) > calmer.count(word)


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer"},
        "mood": {"enum": ["good", "bad"]},
    },
    "required": ["name", "age", "mood"],
}


@pytest.mark.parametrize("seed", [1, 2])
def test_a_grammar_of_a_schema_leaves_only_json_that_fits_it(backend, seed):
    prompt = backend.render(user_prompt("Describe a person."))
    found = answer(backend, prompt, temperature=1.0, seed=seed, max_tokens=120, grammar=grammar_of(json.dumps(SCHEMA)))
    assert found.finish_reason == "stop"
    person = json.loads(found.text)
    assert set(person) == {"name", "age", "mood"} and isinstance(person["age"], int)
    assert len(person["name"]) <= 12 and person["mood"] in ("good", "bad")


def test_a_grammar_that_cannot_be_read_is_an_input_error(backend):
    stream = backend.generate([1, 2, 3], vectors=None, sampling=SamplingConfig(grammar="root ::= ((("))
    with pytest.raises(InputError, match="grammar"):
        next(stream)


@pytest.mark.parametrize(
    "schema",
    [
        '{"$ref": "https://example.org/schema.json"}',
        '{"$ref": "file:///etc/passwd"}',
        '{"type": "sock"}',
        '{"$ref": 3}',
    ],
)
def test_a_schema_that_points_elsewhere_or_makes_no_sense_is_refused_and_nothing_fetched(schema):
    with pytest.raises(InputError, match="grammar"):
        grammar_of(schema)
