"""`edge-align export verify`: do all artefacts in a folder compute the same model, in every engine that is here?"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edge_align.config import bounded, RuntimeConfig, SamplingConfig
from edge_align.errors import BackendUnavailable, InputError
from edge_align.files import shown
from edge_align.gguf_header import read_header
from edge_align.kl import factor_for_kl, open_probe
from edge_align.records import SteeringVectors, user_prompt
from edge_align.runtime.llamacpp import check_steering, LlamaCppBackend
from edge_align.simulation.prompts import prompts
from edge_align_export.engines import Engine, ENGINES, is_gguf, is_hf_folder, REFERENCES, Score

KL = 0.3  # nats per token; what a well-taught profile has
AGREES = 0.99  # share of positions with the same likeliest token
CLOSE = 0.1  # where the reference's two likeliest logits are no further apart, either may win
FLOAT_TYPES = {0: 32.0, 1: 16.0, 30: 16.0}  # ggml type -> bits: F32, F16, BF16

Progress = Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class Row:
    """One artefact in one engine under one set of vectors, against the reference.

    max_difference: of logits. agreement: share of positions with the reference's likeliest token. widest_gap: of the
    reference's two likeliest logits where that differs. passes: None where weights were rounded, so may differ.
    """

    artefact: str
    engine: str
    vectors: str
    positions: int
    max_difference: float
    agreement: float
    widest_gap: float
    passes: bool | None


def verify(
    folder: Path,
    *,
    reference: Path | None = None,
    answers: int = 8,
    tokens: int = 32,
    seed: int = 0,
    runtime: RuntimeConfig | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compare teacher-forced logits on answers that the base samples, unsteered and under random vectors of KL .3.

    reference: a GGUF or a Hugging Face folder, computed in PyTorch float32; None: the least rounded GGUF in `folder`.
    Where PyTorch does not compute its architecture here, llama.cpp stands in, and the result says so.
    Raises InputError, ModelLoadError, CorruptArtefact, BackendUnavailable.
    """
    bounded(answers, 1, 160, "answers")
    bounded(tokens, 1, 512, "tokens")
    runtime = runtime or RuntimeConfig()
    tell = progress or (lambda _stage, _done: None)
    artefacts = find_artefacts(folder)
    ggufs = sorted((path for path in artefacts if is_gguf(path)), key=bits, reverse=True)
    if not ggufs:
        raise InputError(f"{shown(folder)} holds no GGUF; make one with `edge-align export gguf`")
    tell("sample", 0.0)
    texts, vectors = _material(ggufs[0], answers=answers, tokens=tokens, seed=seed, runtime=runtime)
    target = reference or ggufs[0]
    jobs = [(path, engine) for path in artefacts for engine in ENGINES if engine.takes(path)]
    rows: list[Row] = []
    notes: list[str] = []
    with ExitStack() as stack:
        score, held_to = _open_reference(target, runtime, stack, notes)
        wanted = {name: [score(*text, added) for text in texts] for name, added in vectors.items()}
    for done, (path, engine) in enumerate(jobs):
        tell("compare", done / len(jobs))
        if path == target and engine.name == held_to:
            continue
        try:
            with engine.open(path, runtime) as score:
                exact = path == target or is_hf_folder(path) or bits(path) >= 16.0
                for name, added in vectors.items():
                    got = [score(*text, added) for text in texts]
                    rows.append(_compare(wanted[name], got, _name(path, folder), engine.name, name, exact=exact))
        except BackendUnavailable as error:
            notes.append(f"not compared in {engine.name}: {error}")
    tell("compare", 1.0)
    if not rows:
        raise InputError(
            f"there is nothing to compare in {shown(folder)}: {'; '.join(notes) or 'one engine, one file'}"
        )
    return {
        "reference": _name(target, folder),
        "reference_engine": f"{held_to} float32" if held_to != "llama.cpp" else held_to,
        "rows": [asdict(row) for row in rows],
        "notes": list(dict.fromkeys(notes)),
        "ok": all(row.passes is not False for row in rows),
    }


def find_artefacts(folder: Path) -> list[Path]:
    """Everything in `folder`, and one folder deep, that some engine takes. Raises InputError."""
    if not folder.is_dir():
        raise InputError(f"{shown(folder)} is no folder")
    places = [folder, *sorted(folder.iterdir()), *sorted(path for path in folder.glob("*/*") if path.is_file())]
    return [path for path in places if any(engine.takes(path) for engine in ENGINES)]


def bits(path: Path) -> float:
    """Bits per weight of the matrices of a GGUF; 16 and more are floating point."""
    shapes = [tensor for tensor in read_header(path).tensors.values() if len(tensor.shape) > 1]
    if all(tensor.type in FLOAT_TYPES for tensor in shapes):
        return min((FLOAT_TYPES[tensor.type] for tensor in shapes), default=32.0)
    n_values = sum(int(np.prod(tensor.shape, dtype=np.int64)) for tensor in shapes)
    return min(15.9, 8.0 * sum(tensor.n_bytes for tensor in shapes) / n_values)


Text = tuple[list[int], list[int]]


def _material(
    path: Path, *, answers: int, tokens: int, seed: int, runtime: RuntimeConfig
) -> tuple[list[Text], dict[str, SteeringVectors | None]]:
    """Prompts with sampled answers, and vectors to compare under."""
    with LlamaCppBackend.open(path, config=runtime) as backend:
        check_steering(backend)
        rendered = [backend.render(user_prompt(text)) for text in prompts("validation")[:answers]]
        made = backend.generate_batch(rendered, vectors=None, sampling=SamplingConfig(max_tokens=tokens, seed=seed))
        texts = [(prompt, list(answer.tokens)) for prompt, answer in zip(rendered, made, strict=True) if answer.tokens]
        if not texts:
            raise InputError(
                f"{shown(path)} answers nothing at all, so there is nothing to compare; try another --seed"
            )
        array = np.random.default_rng(seed).normal(size=(backend.info.n_layer, backend.info.d_model))
        array[0] = 0
        random = SteeringVectors(0.1 * array)
        probe = open_probe(backend, [prompt for prompt, _ in texts], [answer for _, answer in texts])
        factor, _ = factor_for_kl(backend, probe, random, KL)
    return texts, {"none": None, "random": random.scaled(factor)}


def _open_reference(path: Path, runtime: RuntimeConfig, stack: ExitStack, notes: list[str]) -> tuple[Score, str]:
    fitting = [engine for engine in REFERENCES if engine.takes(path)]
    if not fitting:
        raise InputError(f"{shown(path)} is neither a GGUF nor a Hugging Face folder with safetensors")
    try:
        return stack.enter_context(fitting[0].open(path, runtime)), fitting[0].name
    except BackendUnavailable as error:
        if not is_gguf(path):
            raise
        notes.append(f"held to llama.cpp: {error}; give a Hugging Face folder with --reference")
    engine: Engine = next(engine for engine in ENGINES if engine.takes(path) and engine not in REFERENCES)
    return stack.enter_context(engine.open(path, runtime)), engine.name


def _compare(
    wanted: list[np.ndarray], got: list[np.ndarray], artefact: str, engine: str, vectors: str, *, exact: bool
) -> Row:
    a, b = np.concatenate(wanted), np.concatenate(got)
    if a.shape != b.shape:
        raise InputError(f"{artefact} has a vocabulary of {b.shape[1]}, the reference one of {a.shape[1]}")
    two = np.partition(a, -2, axis=1)[:, -2:]
    same = a.argmax(1) == b.argmax(1)
    gaps = np.where(same, 0.0, two[:, 1] - two[:, 0])
    agreement, widest = float(same.mean()), float(gaps.max())
    passes = (agreement >= AGREES or not same.size) and widest < CLOSE
    return Row(
        artefact=artefact,
        engine=engine,
        vectors=vectors,
        positions=len(a),
        max_difference=float(np.abs(a - b).max()),
        agreement=agreement,
        widest_gap=widest,
        passes=passes if exact else None,
    )


def _name(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.name
