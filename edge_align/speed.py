"""How fast this machine is: steered against unsteered answers, first tokens, and learning a person.

Arms are interleaved in alternating order, so that a machine that slows down slows all of them; a ratio is of paired
runs, with a 95 % bootstrap interval of its median.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TypeVar

import numpy as np

from edge_align.config import SamplingConfig
from edge_align.records import GenerationChunk, GenerationStats, join_chunks, SteeringVectors, user_prompt
from edge_align.runtime.base import Backend

TOKENS = 16  # of an answer to a prompt of a given length
PROMPT = "Write a long and detailed essay about the history of bread."

T = TypeVar("T")
Tell = Callable[[float], None]


@dataclass(frozen=True, slots=True)
class Ratio:
    """Median of paired ratios and its 95 % bootstrap interval."""

    median: float
    ci_low: float
    ci_high: float


@dataclass(frozen=True, slots=True)
class PerToken:
    """Seconds per token after the first (TPOT), medians."""

    base_sec: float
    personal_sec: float
    ratio: Ratio


@dataclass(frozen=True, slots=True)
class AtLength:
    """Seconds to the first token (TTFT) of prompts of one length of which nothing is cached, medians.

    per_token: None where answers ended too soon.
    """

    prompt_tokens: int
    base_sec: float
    personal_sec: float
    ratio: Ratio
    per_token: PerToken | None


@dataclass(frozen=True, slots=True)
class Latency:
    """Tokens per second after the first, medians over runs, and what steering does to them."""

    base_tps: float
    personal_tps: float
    personal_over_base: Ratio
    first_token: tuple[AtLength, ...]


def interleaved(
    arms: Mapping[str, Callable[[], T]], runs: int, *, tell: Tell = lambda _done: None
) -> dict[str, list[T]]:
    """What each arm returns over `runs` rounds, in alternating order; a first round is a warm-up and not kept."""
    found: dict[str, list[T]] = {name: [] for name in arms}
    for i in range(runs + 1):
        for name in list(arms)[:: 1 if i % 2 else -1]:
            value = arms[name]()
            if i:
                found[name].append(value)
        tell((i + 1) / (runs + 1))
    return found


def interval(
    values: Sequence[float] | np.ndarray, *, statistic: Callable[..., np.ndarray] = np.median
) -> tuple[float, float]:
    """95 % percentile bootstrap interval of a statistic (a function with `axis`) of the values."""
    array = np.asarray(values, dtype=float)
    picks = np.random.default_rng(0).integers(0, len(array), size=(2000, len(array)))
    low, high = np.quantile(statistic(array[picks], axis=1), [0.025, 0.975])
    return float(low), float(high)


def paired_ratio(a: Sequence[float], b: Sequence[float]) -> Ratio:
    """a / b, run by run."""
    ratios = np.array(a) / np.array(b)
    return Ratio(float(np.median(ratios)), *interval(ratios))


def some_vectors(backend: Backend) -> SteeringVectors:
    """Vectors on every block but the first, too small to change what is said: which ones does not matter to speed."""
    array = np.full((backend.info.n_layer, backend.info.d_model), 1e-3, np.float32)
    array[0] = 0.0
    return SteeringVectors(array)


def _stats(answer: Iterable[GenerationChunk]) -> GenerationStats:
    stats = join_chunks(list(answer)).stats
    assert stats is not None  # every engine's last chunk has them
    return stats


def at_length(
    backend: Backend, vectors: SteeringVectors, prompt_tokens: int, *, runs: int, tokens: int = TOKENS
) -> AtLength:
    """Time prompts of random words that share nothing with what is cached, and `tokens` of their answers.

    Raises ContextOverflow.
    """
    rng = np.random.default_rng(prompt_tokens)
    low, high = backend.info.n_vocab // 50, backend.info.n_vocab * 4 // 5  # neither control tokens nor the rarest

    def one(steered: SteeringVectors | None) -> GenerationStats:
        prompt = rng.integers(low, high, prompt_tokens).tolist()
        sampling = SamplingConfig(max_tokens=tokens, temperature=0.0)
        return _stats(backend.generate(prompt, vectors=steered, sampling=sampling))

    found = interleaved({"base": lambda: one(None), "personal": lambda: one(vectors)}, runs)
    base, personal = ([stats.ttft_sec for stats in found[name]] for name in ("base", "personal"))
    rates = [(a.generation_tps, b.generation_tps) for a, b in zip(found["base"], found["personal"], strict=True)]
    each = [[1.0 / rate for rate in arm] for arm in zip(*(pair for pair in rates if min(pair) > 0), strict=True)]
    later = PerToken(median(each[0]), median(each[1]), paired_ratio(each[1], each[0])) if each else None
    return AtLength(prompt_tokens, median(base), median(personal), paired_ratio(personal, base), later)


def measure_latency(
    backend: Backend, *, runs: int, tokens: int, prompt_tokens: Sequence[int], tell: Callable[[str, float], None]
) -> Latency:
    """Answer one prompt greedily `runs` times each way, then prompts of each length.

    Raises BackendError, ContextOverflow.
    """
    prompt, vectors = backend.render(user_prompt(PROMPT)), some_vectors(backend)
    sampling = SamplingConfig(max_tokens=tokens, temperature=0.0)

    def speed(steered: SteeringVectors | None) -> float:
        return _stats(backend.generate(prompt, vectors=steered, sampling=sampling)).generation_tps

    arms = {"base": lambda: speed(None), "personal": lambda: speed(vectors)}
    found = interleaved(arms, runs, tell=lambda done: tell("decode", done))
    first = []
    for n in prompt_tokens:
        first.append(at_length(backend, vectors, n, runs=runs))
        tell("first token", len(first) / len(prompt_tokens))
    return Latency(
        base_tps=median(found["base"]),
        personal_tps=median(found["personal"]),
        personal_over_base=paired_ratio(found["personal"], found["base"]),
        first_token=tuple(first),
    )


def stage_seconds(stages: Mapping[str, Callable[[], object]], runs: int, *, tell: Tell) -> dict[str, float]:
    """Median seconds of each stage over `runs` rounds after a warm-up, in the order given."""
    found: dict[str, list[float]] = {name: [] for name in stages}
    for i in range(runs + 1):
        for name, work in stages.items():
            start = time.perf_counter()
            work()
            if i:
                found[name].append(time.perf_counter() - start)
        tell((i + 1) / (runs + 1))
    return {name: median(values) for name, values in found.items()}
