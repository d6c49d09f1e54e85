"""`edge-align export verify`: do all artefacts in a folder compute the same model, in every engine that is here?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edge_align.config import bounded, RuntimeConfig, SamplingConfig
from edge_align.errors import BackendUnavailable, InputError
from edge_align.files import load_json_object, sha256_file, shown
from edge_align.gguf_header import read_header
from edge_align.kl import factor_for_kl, open_probe
from edge_align.onnx_files import is_export, MANIFEST
from edge_align.records import SteeringVectors, user_prompt
from edge_align.runtime.base import Scoring
from edge_align.runtime.llamacpp import check_steering, LlamaCppBackend
from edge_align.simulation.prompts import prompts
from edge_align_export.engines import ENGINES, is_gguf, is_hf_folder, REFERENCE, Score
from edge_align_export.parity import agreement, log_prob, relative_error

KL = 0.3  # nats per token; what a well-taught profile has
AGREES = 0.99  # share of positions with the same likeliest token
CLOSE = 0.1  # where the reference's two likeliest logits are no further apart, either may win
FLOAT_TYPES = {0: 32.0, 1: 16.0, 30: 16.0}  # ggml type -> bits: F32, F16, BF16
ONNX_BITS = {"fp32": 32.0, "fp16": 16.0, "int8": 8.0, "int4": 4.0}

Progress = Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class Row:
    """One artefact in one engine under one set of vectors, against the reference.

    max_difference: of logits. agreement: share of positions with the reference's likeliest token. widest_gap: of the
    reference's two likeliest logits where that differs. preference_error: how far the change that the vectors make to
    log p(a) - log p(b), of two answers to one prompt, is from the reference's, relative to it; None without vectors
    or without two answers. passes: None where weights were rounded, so may differ.
    """

    artefact: str
    engine: str
    vectors: str
    positions: int
    max_difference: float
    agreement: float
    widest_gap: float
    preference_error: float | None
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

    answers: how many, two to a prompt. reference: a GGUF or a Hugging Face folder, computed in PyTorch float32; None:
    the least rounded GGUF in `folder`, else a Hugging Face folder, else the least rounded export. Where neither
    our own reference nor transformers computes it, the engine that reads it stands in, and the result says so.
    Raises InputError, ModelLoadError, CorruptArtefact, BackendUnavailable.
    """
    bounded(answers, 1, 160, "answers")
    bounded(tokens, 1, 512, "tokens")
    runtime = runtime or RuntimeConfig()
    tell = progress or (lambda _stage, _done: None)
    artefacts = find_artefacts(folder)
    runnable = sorted((path for path in artefacts if not is_hf_folder(path)), key=_preference)
    if not runnable:
        raise InputError(
            f"{shown(folder)} holds no GGUF and no ONNX export; make one with `edge-align export gguf` or `export onnx`"
        )
    tell("sample", 0.0)
    texts, vectors = _material(runnable[0], answers=answers, tokens=tokens, seed=seed, runtime=runtime)
    target = reference or min(artefacts, key=_preference)
    jobs = [(path, engine) for path in artefacts for engine in ENGINES if engine.takes(path)]
    rows: list[Row] = []
    notes: list[str] = []
    with ExitStack() as stack:
        score, held_to = _open_reference(target, runtime, stack, notes)
        wanted = {name: [score(*text, added) for text in texts] for name, added in vectors.items()}
    wanted_change = _changes(texts, wanted)
    for done, (path, engine) in enumerate(jobs):
        tell("compare", done / len(jobs))
        if path == target and engine.name == held_to:
            continue
        try:
            with engine.open(path, runtime) as score:
                got = {name: [score(*text, added) for text in texts] for name, added in vectors.items()}
        except BackendUnavailable as error:
            notes.append(f"not compared in {engine.name}: {error}")
            continue
        artefact, judged = _name(path, folder), _is_judged(path, target, runnable)
        for a, b in zip(wanted["none"], got["none"], strict=True):
            if a.shape != b.shape:
                raise InputError(f"{artefact} has a vocabulary of {b.shape[1]}, the reference one of {a.shape[1]}")
        change = _changes(texts, got)
        for name in vectors:
            found = agreement(wanted[name], got[name])
            passes = found.agreement >= AGREES and found.widest_gap < CLOSE
            rows.append(
                Row(
                    artefact=artefact,
                    engine=engine.name,
                    vectors=name,
                    **asdict(found),
                    preference_error=relative_error(wanted_change[name], change[name]) if wanted_change[name] else None,
                    passes=passes if judged else None,
                )
            )
    tell("compare", 1.0)
    if not rows:
        raise InputError(
            f"there is nothing to compare in {shown(folder)}: {'; '.join(notes) or 'one engine, one file'}"
        )
    return {
        "reference": _name(target, folder),
        "reference_engine": f"{held_to} float32" if held_to == "PyTorch" else held_to,
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
    """Bits per weight of the matrices of an artefact; 16 and more are floating point."""
    if is_hf_folder(path):
        return 32.0
    if is_export(path):
        return ONNX_BITS.get(str(load_json_object(path / MANIFEST).get("precision")), 4.0)
    shapes = [tensor for tensor in read_header(path).tensors.values() if len(tensor.shape) > 1]
    if all(tensor.type in FLOAT_TYPES for tensor in shapes):
        return min((FLOAT_TYPES[tensor.type] for tensor in shapes), default=32.0)
    n_values = sum(int(np.prod(tensor.shape, dtype=np.int64)) for tensor in shapes)
    return min(15.9, 8.0 * sum(tensor.n_bytes for tensor in shapes) / n_values)


def _preference(path: Path) -> tuple[int, float]:
    """Sorts what a reference is taken from: GGUFs before folders before exports, and the least rounded first."""
    kind = 0 if is_gguf(path) else 1 if is_hf_folder(path) else 2
    return kind, -bits(path)


def _is_judged(path: Path, target: Path, artefacts: list[Path]) -> bool:
    """Should this artefact compute what the target does? Not where its weights, or those it was made of, were rounded.

    Of a rounded GGUF llama.cpp rounds the activations too, so even against itself in float32 it is not judged. An
    export in floating point of a quantised GGUF has that file's weights, so it is judged when that is the target.
    """
    if bits(path) < 16.0:
        return False
    if path == target or not is_export(path):
        return True
    source = load_json_object(path / MANIFEST).get("base_hash")
    if is_gguf(target) and sha256_file(target) == source:
        return True
    return all(bits(file) >= 16.0 for file in artefacts if is_gguf(file) and sha256_file(file) == source)


Text = tuple[list[int], list[int]]


def _material(
    path: Path, *, answers: int, tokens: int, seed: int, runtime: RuntimeConfig
) -> tuple[list[Text], dict[str, SteeringVectors | None]]:
    """Prompts with sampled answers, two to each prompt where `answers` is even, and vectors to compare under."""
    with _open_backend(path, runtime) as backend:
        questions = [text for text in prompts("validation")[: (answers + 1) // 2] for _ in range(2)][:answers]
        rendered = [backend.render(user_prompt(text)) for text in questions]
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


def _changes(texts: list[Text], logits: dict[str, list[np.ndarray]]) -> dict[str, list[float]]:
    """For each set of vectors, what they add to log p(first) - log p(second) of every prompt with two answers."""
    pairs = [i for i in range(len(texts) - 1) if texts[i][0] == texts[i + 1][0] and texts[i][1] != texts[i + 1][1]]
    sums = {
        name: [log_prob(array, text[1]) for array, text in zip(arrays, texts, strict=True)]
        for name, arrays in logits.items()
    }
    plain = sums["none"]
    return {
        name: [] if name == "none" else [(own[i] - own[i + 1]) - (plain[i] - plain[i + 1]) for i in pairs]
        for name, own in sums.items()
    }


@contextmanager
def _open_backend(path: Path, runtime: RuntimeConfig) -> Iterator[Scoring]:
    """The engine that answers with a GGUF or an export; of llama.cpp's, one that steers."""
    if is_gguf(path):
        with LlamaCppBackend.open(path, config=runtime) as backend:
            check_steering(backend)
            yield backend
        return
    from edge_align.runtime.onnx import OnnxBackend

    with OnnxBackend.open(path, config=runtime) as exported:
        yield exported


def _open_reference(path: Path, runtime: RuntimeConfig, stack: ExitStack, notes: list[str]) -> tuple[Score, str]:
    fitting = [engine for engine in ENGINES if engine.takes(path)]
    if not fitting:
        raise InputError(f"{shown(path)} is no GGUF, no Hugging Face folder with safetensors, and no ONNX export")
    why = "PyTorch reads no ONNX export"
    for engine in fitting[:-1]:
        try:
            return stack.enter_context(engine.open(path, runtime)), engine.name
        except BackendUnavailable as error:
            why = str(error)
    last = fitting[-1]
    score: Score = stack.enter_context(last.open(path, runtime))
    if last is not REFERENCE:
        notes.append(f"held to {last.name}: {why}; give a Hugging Face folder with --reference")
    return score, last.name


def _name(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.name
