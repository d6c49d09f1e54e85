"""Prompts are read in parts that depend on what stands before them alone; on a tiny model, to the last bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from reference.prompt_stretches import stretches

from edge_align.config import RuntimeConfig, SamplingConfig
from edge_align.records import GenerationChunk
from edge_align.runtime.llama_checks import part_ends
from edge_align.runtime.llamacpp import LlamaCppBackend, PREFILL_CHUNK
from scripts.tiny_models import write_gguf

TURN_ENDS = (0, 2)
SAMPLING = SamplingConfig(max_tokens=3, temperature=0.0, top_logprobs=0)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaCppBackend]:
    path = write_gguf(tmp_path_factory.mktemp("parts") / "tiny.gguf")
    with LlamaCppBackend.open(path, config=RuntimeConfig(n_threads=1, n_ctx=512)) as backend:
        yield backend


def lengths(tokens: Sequence[int]) -> list[int]:
    """Of the parts: a turn ends one, and so does its PREFILL_CHUNK-th token."""
    found = [0]
    for token in tokens:
        found[-1] += 1
        if token in TURN_ENDS or found[-1] == PREFILL_CHUNK:
            found.append(0)
    return [n for n in found if n]


def words(rng: np.random.Generator, n: int) -> list[int]:
    return [int(token) for token in rng.integers(5, 200, n)]


def asked(backend: LlamaCppBackend, tokens: Sequence[int]) -> tuple[list[GenerationChunk], int]:
    """The chunks of an answer, and how many of its prompt's tokens were not computed."""
    chunks = list(backend.generate(tokens, vectors=None, sampling=SAMPLING))
    assert chunks[-1].stats is not None
    return chunks, chunks[-1].stats.cached_tokens


def test_what_is_reused_ends_with_a_part_and_changes_no_bit(tiny: LlamaCppBackend) -> None:
    rng = np.random.default_rng(0)
    first = [*words(rng, 40), 2, *words(rng, 90), 0, *words(rng, 70)]
    reused = set()
    for _ in range(40):
        tokens = first[: rng.integers(2, len(first))] + words(rng, int(rng.integers(0, 80)))
        if rng.random() < 0.5:
            tokens = [*tokens[:-1], 2, 7]
        ends = np.cumsum(lengths(tokens[:-1])).tolist()
        assert part_ends(np.array(tokens[:-1], np.int32), lambda token: token in TURN_ENDS, PREFILL_CHUNK) == ends
        chunks, cached = asked(tiny, tokens)
        fork = tiny.fork()
        fresh, nothing = asked(fork, tokens)
        fork.close()
        pauses = len(stretches(lengths(tokens[:-1]), PREFILL_CHUNK)) - 1
        assert nothing == 0 and cached in (0, *ends)
        assert sum(not one.tokens and one.finish_reason is None for one in fresh) == pauses
        told = [[(one.tokens, one.logprobs) for one in found if one.tokens] for found in (chunks, fresh)]
        assert told[0] == told[1]
        reused.add(cached)
    assert {0, 41, 105} < reused  # nothing, a turn, and a turn with a part of the next


@pytest.mark.parametrize(("n", "ends"), [(0, [0]), (1, [1]), (64, [64]), (65, [64, 65]), (128, [64, 128])])
def test_a_prompt_of_one_turn_is_read_in_equal_parts(n: int, ends: list[int]) -> None:
    assert part_ends(np.full(n, 9, np.int32), lambda token: token == 2, 64) == ends
