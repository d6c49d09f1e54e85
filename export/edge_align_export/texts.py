"""Answers that a pack is made from: sampled from the base, or (fast) committed texts; kept chunk by chunk on disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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

    Also (n, len(layers), d_model) float32: the mean hidden states over each answer, with its prompt in front, centred
    by position.
    """
    rows: list[tuple[list[int], list[int], int]] = []
    read: list[np.ndarray] = []
    shape = (sampling.max_tokens, len(layers), d_model)
    total = PositionSums(*shape)
    for start in range(0, len(questions), CHUNK):
        chunk = questions[start : start + CHUNK]
        rendered = [backend.render(user_prompt(question)) for question in chunk]
        path = work / f"answers-{start:05d}.json"
        n = len(chunk) * per_prompt
        kept = _read(path, n=n)
        states = kept_arrays(path.with_suffix(".npz"), means=(n, *shape[1:]), sums=shape, counts=shape[:1])
        if kept is None or states is None:
            seeded = SamplingConfig(
                temperature=sampling.temperature,
                top_k=sampling.top_k,
                top_p=sampling.top_p,
                max_tokens=sampling.max_tokens,
                seed=sampling.seed + start * per_prompt,
            )
            repeated = [prompt for prompt in rendered for _ in range(per_prompt)]
            here = PositionSums(*shape)
            kept, means = passes.sample_and_read(repeated, sampling=seeded, layers=layers, positions=here)
            states = {"means": means, "sums": here.sums, "counts": here.counts}
            keep_arrays(path.with_suffix(".npz"), **states)
            write_atomic(path, json.dumps(kept).encode())
        total.sums += states["sums"]
        total.counts += states["counts"]
        for i, tokens in enumerate(kept):
            if len(tokens) > 2:
                rows.append((rendered[i // per_prompt], tokens, start + i // per_prompt))
                read.append(states["means"][i])
        tell((start + len(chunk)) / len(questions))
    answers = Answers(
        questions=list(questions),
        prompts=[row[0] for row in rows],
        completions=[row[1] for row in rows],
        groups=np.array([row[2] for row in rows]),
    )
    lengths = np.array([len(tokens) for tokens in answers.completions])
    return answers, centred(np.stack(read), lengths, total.sums, total.counts)


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
