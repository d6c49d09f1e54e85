"""Answers that a pack is made from: sampled from the base, or (fast) committed texts; kept chunk by chunk on disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from edge_align.config import SamplingConfig
from edge_align.files import write_atomic
from edge_align.records import user_prompt
from edge_align.runtime.llamacpp import LlamaCppBackend
from edge_align.runtime.positions import centred, PositionSums
from edge_align.simulation.foreign import foreign_pairs
from edge_align_export.passes import Passes

ROWS = 64  # answers read, and kept, at a time


@dataclass(frozen=True)
class Answers:
    """Several answers to each of many prompts. prompts[i] and completions[i] are token ids; groups[i] the prompt."""

    questions: list[str]
    prompts: list[list[int]]
    completions: list[list[int]]
    groups: np.ndarray

    def __len__(self) -> int:
        return len(self.completions)


@dataclass(frozen=True)
class States:
    """Mean hidden states of each answer, with its prompt in front: (n, len(layers), d_model) float32.

    plain as they are; centred less what the mean answer has at the positions it covers (`runtime.positions`).
    """

    plain: np.ndarray
    centred: np.ndarray


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
) -> tuple[Answers, States]:
    """Sample from the base, and read; chunks already in `work` are taken from there, so a stopped run goes on."""
    rows: list[tuple[list[int], list[int], int]] = []
    read: list[np.ndarray] = []
    shape = (sampling.max_tokens, len(layers), d_model)
    total = PositionSums(*shape)
    for start in range(0, len(questions), passes.prompts_at_once):
        chunk = questions[start : start + passes.prompts_at_once]
        rendered = [backend.render(user_prompt(question)) for question in chunk]
        path = work / f"answers-{start:05d}.json"
        kept = kept_tokens(path, n=len(chunk) * per_prompt)
        states = None if kept is None else kept_states(path, n=len(kept), total=total)
        if kept is None or states is None:
            seeded = replace(sampling, seed=sampling.seed + start * per_prompt)
            repeated = [prompt for prompt in rendered for _ in range(per_prompt)]
            here = PositionSums(*shape)
            kept, states = passes.sample_and_read(repeated, sampling=seeded, layers=layers, positions=here)
            keep_states(path, states, here, total=total)
            write_atomic(path, json.dumps(kept).encode())
        for i, tokens in enumerate(kept):
            if len(tokens) > 2:
                rows.append((rendered[i // per_prompt], tokens, start + i // per_prompt))
                read.append(states[i])
        tell((start + len(chunk)) / len(questions))
    answers = Answers(
        questions=list(questions),
        prompts=[row[0] for row in rows],
        completions=[row[1] for row in rows],
        groups=np.array([row[2] for row in rows]),
    )
    return answers, _states(np.stack(read), answers, total)


def read_answers(
    passes: Passes,
    answers: Answers,
    *,
    layers: Sequence[int],
    d_model: int,
    work: Path,
    tell: Callable[[float], None],
) -> States:
    """What `sample_answers` reads while it samples, of answers that are there already."""
    parts = []
    total = PositionSums(max(map(len, answers.completions)), len(layers), d_model)
    for start in range(0, len(answers), ROWS):
        path = work / f"deep-{start:06d}.json"
        chunk = slice(start, start + ROWS)
        pairs = list(zip(answers.prompts[chunk], answers.completions[chunk], strict=True))
        states = kept_states(path, n=len(pairs), total=total)
        if states is None:
            here = PositionSums(*total.sums.shape)
            states = passes.mean_hidden(
                [[*prompt, *answer] for prompt, answer in pairs],
                [(len(prompt), len(prompt) + len(answer)) for prompt, answer in pairs],
                list(layers),
                positions=here,
            )
            keep_states(path, states, here, total=total)
        parts.append(states)
        tell((start + len(pairs)) / len(answers))
    return _states(np.concatenate(parts), answers, total)


def _states(means: np.ndarray, answers: Answers, total: PositionSums) -> States:
    return States(means, centred(means, np.array([len(tokens) for tokens in answers.completions]), total))


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


def kept_states(path: Path, *, n: int, total: PositionSums) -> np.ndarray | None:
    """What `keep_states` kept beside `path`: mean states of n answers; their sums are added to `total`."""
    shape = total.sums.shape
    kept = kept_arrays(path.with_suffix(".npz"), means=(n, *shape[1:]), sums=shape, counts=shape[:1])
    if kept is None:
        return None
    total.merge(kept["sums"], kept["counts"])
    return kept["means"]


def keep_states(path: Path, means: np.ndarray, positions: PositionSums, *, total: PositionSums) -> None:
    """Keep mean states and their sums by position beside `path`, and add the sums to `total`."""
    keep_arrays(path.with_suffix(".npz"), means=means, sums=positions.sums, counts=positions.counts)
    total.merge(positions.sums, positions.counts)


def kept_tokens(path: Path, *, n: int) -> list[list[int]] | None:
    """A kept chunk, or None when there is none or it is not whole."""
    try:
        kept = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    whole = isinstance(kept, list) and len(kept) == n and all(isinstance(tokens, list) for tokens in kept)
    return kept if whole else None


def kept_arrays(path: Path, **shapes: tuple[int, ...]) -> dict[str, np.ndarray] | None:
    """Arrays kept by `keep_arrays`, or None when there are none of those names and shapes."""
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            found = {name: file[name] for name in shapes}
    except (OSError, ValueError, EOFError, KeyError, BadZipFile):
        return None
    return found if all(found[name].shape == shape for name, shape in shapes.items()) else None


def keep_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Keep arrays where a later run finds them, floats as float32; the file appears whole or not at all."""
    with path.with_suffix(".tmp").open("wb") as file:
        small = {name: x.astype(np.float32) if x.dtype.kind == "f" else x for name, x in arrays.items()}
        np.savez(file, allow_pickle=False, **small)
    path.with_suffix(".tmp").replace(path)
