"""Answers that a pack is made from: sampled from the base, or (fast) committed texts; kept chunk by chunk on disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge_align.config import SamplingConfig
from edge_align.files import write_atomic
from edge_align.records import user_prompt
from edge_align.runtime.llamacpp import LlamaCppBackend
from edge_align.simulation.foreign import foreign_pairs
from edge_align_export.passes import Passes

CHUNK = 16  # prompts sampled, and kept, at a time


@dataclass(frozen=True)
class Answers:
    """Several answers to each of many prompts. prompts[i] and completions[i] are token ids; groups[i] the prompt."""

    questions: list[str]
    prompts: list[list[int]]
    completions: list[list[int]]
    groups: np.ndarray

    def __len__(self) -> int:
        return len(self.completions)


def sample_answers(
    passes: Passes,
    backend: LlamaCppBackend,
    questions: Sequence[str],
    *,
    per_prompt: int,
    sampling: SamplingConfig,
    layers: Sequence[int],
    d_model: int,
    work: Path,
    tell: Callable[[float], None],
) -> tuple[Answers, np.ndarray]:
    """Sample from the base; chunks already in `work` are taken from there, so a stopped run goes on.

    Also (n, len(layers), d_model) float32: the mean hidden states over each answer, with its prompt in front.
    """
    rows: list[tuple[list[int], list[int], int]] = []
    read: list[np.ndarray] = []
    for start in range(0, len(questions), CHUNK):
        chunk = questions[start : start + CHUNK]
        rendered = [backend.render(user_prompt(question)) for question in chunk]
        path = work / f"answers-{start:05d}.json"
        n = len(chunk) * per_prompt
        kept, deep = _read(path, n=n), kept_array(path.with_suffix(".npy"), (n, len(layers), d_model))
        if kept is None or deep is None:
            seeded = SamplingConfig(
                temperature=sampling.temperature,
                top_k=sampling.top_k,
                top_p=sampling.top_p,
                max_tokens=sampling.max_tokens,
                seed=sampling.seed + start * per_prompt,
            )
            repeated = [prompt for prompt in rendered for _ in range(per_prompt)]
            kept, means = passes.sample_and_read(repeated, sampling=seeded, layers=layers)
            deep = means.astype(np.float16)
            keep_array(path.with_suffix(".npy"), deep)
            write_atomic(path, json.dumps(kept).encode())
        for i, tokens in enumerate(kept):
            if len(tokens) > 2:
                rows.append((rendered[i // per_prompt], tokens, start + i // per_prompt))
                read.append(deep[i].astype(np.float32))
        tell((start + len(chunk)) / len(questions))
    answers = Answers(
        questions=list(questions),
        prompts=[row[0] for row in rows],
        completions=[row[1] for row in rows],
        groups=np.array([row[2] for row in rows]),
    )
    return answers, np.stack(read)


def committed_answers(backend: LlamaCppBackend, *, prompts: int, max_tokens: int) -> Answers:
    """Hand-written answers that ship with edge-align: no sampling, but styles the base may not have.

    prompts: at most this many; there are 46, with about 25 answers each.
    """
    by_prompt: dict[str, set[str]] = {}
    for pair in foreign_pairs("plain", n=1_000, rng=np.random.default_rng(0)):
        by_prompt.setdefault(pair.prompt[-1].content, set()).update((pair.chosen, pair.rejected))
    by_prompt = dict([*by_prompt.items()][:prompts])
    rows = []
    for group, (question, texts) in enumerate(by_prompt.items()):
        prompt = backend.render(user_prompt(question))
        rows += [(prompt, backend.tokenize(text)[:max_tokens], group) for text in sorted(texts)]
    return Answers(
        questions=list(by_prompt),
        prompts=[row[0] for row in rows],
        completions=[row[1] for row in rows],
        groups=np.array([row[2] for row in rows]),
    )


def _read(path: Path, *, n: int) -> list[list[int]] | None:
    """A kept chunk, or None when there is none or it is not whole."""
    try:
        kept = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    whole = isinstance(kept, list) and len(kept) == n and all(isinstance(tokens, list) for tokens in kept)
    return kept if whole else None


def kept_array(path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """An array kept by `keep_array`, or None when there is none of that shape."""
    try:
        part = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return part if part.shape == shape else None


def keep_array(path: Path, array: np.ndarray) -> None:
    """Keep an array where a later run finds it; the file appears whole or not at all."""
    with path.with_suffix(".tmp").open("wb") as file:
        np.save(file, array, allow_pickle=False)
    path.with_suffix(".tmp").replace(path)
