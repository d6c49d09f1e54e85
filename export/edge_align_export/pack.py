"""`edge-align export pack`: build the latent pack of a base, once for all who use it."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import edge_align
from edge_align.bases import BaseModel, find_base
from edge_align.config import bounded, RuntimeConfig, SamplingConfig
from edge_align.errors import CorruptArtefact, InputError
from edge_align.features import open_encoder, prompt_features
from edge_align.files import make_private_dir
from edge_align.gguf_tensors import GGUFTensors
from edge_align.home import Home
from edge_align.kl import measured_kl, open_probe, Probe
from edge_align.pack import fit_kl_curve, kl_of_quadratic, LatentPack, load_pack, save_pack
from edge_align.runtime.activations import ActivationReader
from edge_align.runtime.llamacpp import check_steering, LlamaCppBackend
from edge_align.simulation.prompts import prompts
from edge_align_export.card import card
from edge_align_export.linear import LinearPack, solve
from edge_align_export.metric import fisher_metric
from edge_align_export.texts import Answers, committed_answers, sample_answers

Progress = Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class LinearConfig:
    """The `linear` recipe. What each number was chosen by is in docs/decisions/0004."""

    k: int = 64
    prompts: int = 240
    answers: int = 4  # per prompt
    max_tokens: int = 96
    first_layer: float = 0.27  # of n_layer: blocks 8 to 21 of 30
    last_layer: float = 0.70
    ridge: float = 0.3
    head_inputs: int = 16
    metric_answers: int = 10
    metric_tokens: int = 32
    metric_step: float = 0.3
    curve_points: int = 24
    loop_latents: int = 24
    loop_prompts: int = 8
    loop_tokens: int = 48
    loop_kl: float = 0.4
    seed: int = 1000

    def __post_init__(self) -> None:
        bounded(self.k, 2, 1024, "k")
        bounded(self.prompts, 8, 1200, "prompts")
        bounded(self.answers, 2, 64, "answers")


def build_pack(
    *,
    home: Home,
    model: str | None,
    recipe: str = "linear",
    out: Path | None = None,
    fast: bool = False,
    runtime: RuntimeConfig | None = None,
    progress: Progress | None = None,
    config: LinearConfig | None = None,
) -> dict[str, Any]:
    """Build and save a pack; resumable: what a stopped run sampled and read is kept in the home's cache.

    Returns the folder, sizes, seconds per stage and health numbers. Raises InputError, BackendUnavailable,
    ModelLoadError, StorageError, CorruptArtefact.
    """
    if recipe != "linear":
        raise InputError(f"unknown recipe {recipe!r}; there is: linear")
    config = config or LinearConfig()
    runtime = runtime or RuntimeConfig()
    base = find_base(model, home=home)
    folder = out or home.packs_dir / f"{base.id}-{base.hash.removeprefix('sha256:')[:12]}"
    work = make_private_dir(home.cache_dir / f"pack-{_texts_id(base, config, fast=fast)}")
    seconds: dict[str, float] = {}

    def stage(name: str) -> Callable[[float], None]:
        start = time.perf_counter()

        def tell(done: float) -> None:
            seconds[name] = round(time.perf_counter() - start, 1)
            if progress is not None:
                progress(name, done)

        tell(0.0)
        return tell

    with ExitStack() as stack:
        backend = stack.enter_context(LlamaCppBackend.open(base.path, config=runtime))
        check_steering(backend)
        tell = stage("sample")
        if fast:
            answers = committed_answers(backend, prompts=config.prompts, max_tokens=config.max_tokens)
            tell(1.0)
        else:
            answers = sample_answers(
                backend,
                prompts("pack")[: config.prompts],
                per_prompt=config.answers,
                sampling=SamplingConfig(max_tokens=config.max_tokens, seed=config.seed),
                work=work,
                tell=tell,
            )
        layers = steered_layers(base, config)
        deep = _read_activations(base, answers, layers, runtime=runtime, work=work, tell=stage("activations"))
        linear = _solve(base, backend, answers, deep, layers, config, tell=stage("solve"))
        rng = np.random.default_rng(config.seed)
        pack = _measure(base, backend, answers, linear, config, rng, stage)
        health = {"r2": round(linear.r2, 4), **pack.health}
        health |= _closed_loop(base, backend, answers, pack.pack, config, rng, tell=stage("closed loop"))

    manifest = {
        "base": base.id,
        "base_hash": base.hash,
        "architecture": base.header.architecture,
        "n_layer": base.n_layer,
        "d_model": base.d_model,
        "k": pack.pack.k,
        "recipe": "linear-fast" if fast else "linear",
        "config": asdict(config),
        "layers": [layers.start, layers.stop - 1],
        "answers": len(answers),
        "health": health,
        "seconds": seconds,
        "edge_align": edge_align.__version__,
        "engine": backend.info.version,
        "command": f"edge-align export pack --model {base.id} --recipe linear" + (" --fast" if fast else ""),
    }
    tensors = _tensors(linear) | {"metric": pack.pack.metric, "kl_curve": pack.pack.kl_curve}
    save_pack(folder, tensors=tensors, manifest=manifest, card=card(manifest))
    load_pack(folder, base_hash=base.hash)
    return {
        "pack": str(folder),
        "bytes": sum(path.stat().st_size for path in folder.iterdir()),
        "k": pack.pack.k,
        "answers": len(answers),
        "seconds": seconds,
        "health": health,
    }


def _texts_id(base: BaseModel, config: LinearConfig, *, fast: bool) -> str:
    """Names the kept answers and activations: everything they depend on, and nothing that comes after them."""
    settings = [config.prompts, config.answers, config.max_tokens, config.seed, config.first_layer, config.last_layer]
    return hashlib.sha256(json.dumps([base.hash, fast, *settings]).encode()).hexdigest()[:12]


def steered_layers(base: BaseModel, config: LinearConfig) -> range:
    """Blocks that a pack steers; block 0 never, at least one."""
    first = max(1, round(config.first_layer * base.n_layer))
    return range(first, max(first + 1, round(config.last_layer * base.n_layer) + 1))


def _read_activations(
    base: BaseModel,
    answers: Answers,
    layers: range,
    *,
    runtime: RuntimeConfig,
    work: Path,
    tell: Callable[[float], None],
) -> np.ndarray:
    """(n, len(layers), d_model) mean hidden states over each answer, with its prompt in front."""
    parts = []
    size = 64
    with ActivationReader.open(base.path, config=runtime) as reader:
        for start in range(0, len(answers), size):
            path = work / f"deep-{start:06d}.npy"
            chunk = slice(start, start + size)
            n = len(answers.completions[chunk])
            part = _kept_array(path, (n, len(layers), base.d_model))
            if part is None:
                pairs = list(zip(answers.prompts[chunk], answers.completions[chunk], strict=True))
                part = reader.mean_hidden(
                    [[*prompt, *answer] for prompt, answer in pairs],
                    [(len(prompt), len(prompt) + len(answer)) for prompt, answer in pairs],
                    list(layers),
                ).astype(np.float16)
                with path.with_suffix(".tmp").open("wb") as file:
                    np.save(file, part, allow_pickle=False)
                path.with_suffix(".tmp").replace(path)
            parts.append(part.astype(np.float32))
            tell((start + n) / len(answers))
    deep = np.concatenate(parts)
    if not np.isfinite(deep).all():
        raise CorruptArtefact(f"{base.path} computes activations that are not finite; the file may be damaged")
    return deep


def _kept_array(path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    try:
        part = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return part if part.shape == shape else None


def _solve(
    base: BaseModel,
    backend: LlamaCppBackend,
    answers: Answers,
    deep: np.ndarray,
    layers: range,
    config: LinearConfig,
    *,
    tell: Callable[[float], None],
) -> LinearPack:
    features = open_encoder(base.path).encode(answers.completions)
    described = prompt_features(GGUFTensors(base.path), [backend.tokenize(text) for text in answers.questions])
    linear = solve(
        features=features,
        deep=deep,
        groups=answers.groups,
        prompt_features=described,
        layers=layers,
        n_layer=base.n_layer,
        k=min(config.k, len(answers) // 4),
        ridge=config.ridge,
        inputs=config.head_inputs,
    )
    tell(1.0)
    return linear


def _tensors(linear: LinearPack) -> dict[str, np.ndarray]:
    return {
        "readout": linear.readout,
        "feature_mean": linear.feature_mean,
        "baseline": linear.baseline,
        "prompt_projection": linear.prompt_projection,
        "variance": linear.variance,
        "decoder": linear.decoder,
    }


@dataclass(frozen=True)
class _Measured:
    pack: LatentPack
    health: dict[str, float]


def _measure(
    base: BaseModel,
    backend: LlamaCppBackend,
    answers: Answers,
    linear: LinearPack,
    config: LinearConfig,
    rng: np.random.Generator,
    stage: Callable[[str], Callable[[float], None]],
) -> _Measured:
    """Fisher metric, then the KL curve on other answers, along random and along natural directions."""

    def probe(first: int) -> Probe:
        rows = [int(np.flatnonzero(answers.groups == g)[0]) for g in np.unique(answers.groups)[first::7]]
        rows = rows[: config.metric_answers]
        return open_probe(
            backend,
            [answers.prompts[row] for row in rows],
            [answers.completions[row][: config.metric_tokens] for row in rows],
        )

    k = len(linear.decoder)
    pack = LatentPack(
        manifest={"base_hash": base.hash},
        **_tensors(linear),
        metric=np.eye(k, dtype=np.float32),
        kl_curve=np.array([0, 1, 0], np.float32),
        hash="",
    )
    metric = fisher_metric(backend, probe(0), pack.decode, k=k, step=config.metric_step, tell=stage("metric"))
    tell = stage("KL curve")
    other = probe(3)
    quadratic, measured = [], []
    for i in range(config.curve_points):
        z = rng.standard_normal(k)
        if i % 2:  # a direction in which answers really differ, as a person's will be
            a, b = rng.integers(len(linear.latents), size=(2, 12))
            z = (linear.latents[a] - linear.latents[b]).mean(0)
        q = np.exp(np.log(0.02) + (np.log(3.0) - np.log(0.02)) * (i + 0.5) / config.curve_points)
        z = (z * np.sqrt(2 * q / (z @ metric @ z))).astype(np.float32)
        quadratic.append(q)
        measured.append(measured_kl(backend, other, pack.decode(z)))
        tell((i + 1) / config.curve_points)
    curve = fit_kl_curve(np.array(quadratic), np.array(measured))
    error = np.log([kl_of_quadratic(q, curve) / kl for q, kl in zip(quadratic, measured, strict=True)])
    health = {
        "kl_factor_median": round(float(np.exp(np.median(np.abs(error)))), 3),
        "kl_factor_worst": round(float(np.exp(np.abs(error).max())), 3),
    }
    return _Measured(replace(pack, metric=metric, kl_curve=curve), health)


def _closed_loop(
    base: BaseModel,
    backend: LlamaCppBackend,
    answers: Answers,
    pack: LatentPack,
    config: LinearConfig,
    rng: np.random.Generator,
    *,
    tell: Callable[[float], None],
) -> dict[str, float]:
    """Inject a latent, generate, encode the answers: how much of it comes back, and in which direction."""
    encoder = open_encoder(base.path)
    groups = rng.choice(np.unique(answers.groups), size=config.loop_prompts, replace=False)
    rows = [int(np.flatnonzero(answers.groups == g)[0]) for g in groups]
    rendered = [answers.prompts[row] for row in rows]
    sampling = SamplingConfig(max_tokens=config.loop_tokens, seed=config.seed + 99)

    def mean_latent(z: np.ndarray | None) -> np.ndarray:
        vectors = None if z is None else pack.decode(z)
        made = backend.generate_batch(rendered, vectors=vectors, sampling=sampling)
        texts = [list(answer.tokens) for answer in made if len(answer.tokens) > 2]
        latent: np.ndarray = pack.encode(encoder.encode(texts)).mean(0)
        return latent

    unsteered = mean_latent(None)
    gains, cosines = [], []
    for i in range(config.loop_latents):
        z = rng.standard_normal(pack.k).astype(np.float32)
        z *= pack.scale_for(z[None], config.loop_kl)
        back = mean_latent(z) - unsteered
        gains.append(float(back @ z / (z @ z)))
        cosines.append(float(back @ z / (np.linalg.norm(back) * np.linalg.norm(z))))
        tell((i + 1) / config.loop_latents)
    return {"loop_gain": round(float(np.mean(gains)), 3), "loop_cosine": round(float(np.mean(cosines)), 3)}
