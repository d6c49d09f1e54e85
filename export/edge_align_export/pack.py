"""`edge-align export pack`: build the latent pack of a base, once for all who use it."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
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
from edge_align.fluency import sampled_nll
from edge_align.gguf_tensors import GGUFTensors
from edge_align.home import Home
from edge_align.kl import measured_kl, open_probe, Probe
from edge_align.pack import fit_kl_curve, kl_of_quadratic, LatentPack, load_pack, save_pack
from edge_align.runtime.llamacpp import check_steering, LlamaCppBackend
from edge_align.runtime.positions import centred, PositionSums
from edge_align.simulation.prompts import prompts
from edge_align.simulation.users import MORE_USERS
from edge_align_export.card import card
from edge_align_export.linear import LinearPack, solve
from edge_align_export.metric import fisher_metric
from edge_align_export.passes import open_passes, Passes
from edge_align_export.texts import Answers, committed_answers, keep_arrays, kept_arrays, sample_answers

Progress = Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class LinearConfig:
    """The `linear` recipe. What each number was chosen by is in docs/decisions/0004."""

    k: int = 96
    prompts: int = 304
    answers: int = 8  # per prompt
    max_tokens: int = 256  # whole answers: of cut ones, fewer words would mean longer words
    first_layer: float = 0.27  # of n_layer: blocks 8 to 21 of 30
    last_layer: float = 0.70
    ridge: float = 0.3
    head_inputs: int = 16
    metric_answers: int = 16
    metric_tokens: int = 40
    metric_step: float = 0.3
    curve_points: int = 27
    loop_latents: int = 16
    loop_prompts: int = 16
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
        passes = open_passes(base, backend, runtime=runtime)
        stack.callback(passes.close)
        layers = steered_layers(base, config)
        if fast:
            answers = committed_answers(backend, prompts=config.prompts, max_tokens=config.max_tokens)
            deep = _read_activations(base, passes, answers, layers, work=work, tell=stage("activations"))
        else:
            answers, deep = sample_answers(
                passes,
                backend,
                prompts("pack")[: config.prompts],
                per_prompt=config.answers,
                sampling=SamplingConfig(max_tokens=config.max_tokens, seed=config.seed),
                layers=layers,
                d_model=base.d_model,
                work=work,
                tell=stage("sample"),
            )
        if not np.isfinite(deep).all():
            raise CorruptArtefact(f"{base.path} computes activations that are not finite; the file may be damaged")
        linear = _solve(base, backend, answers, deep, layers, config, tell=stage("solve"))
        rng = np.random.default_rng(config.seed)
        pack = _measure(base, backend, answers, linear, config, rng, work, stage)
        health = {"r2": round(linear.r2, 4), **pack.health}
        health["base_nll"] = round(sampled_nll(backend, None), 4)
        health |= _closed_loop(base, passes, answers, pack.pack, config, rng, tell=stage("closed loop"))

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
        "passes": passes.reason,
        "command": _command(base, config, fast=fast),
    }
    tensors = _tensors(linear) | {
        "metric": pack.pack.metric,
        "kl_curve": pack.pack.kl_curve,
    }
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


def _command(base: BaseModel, config: LinearConfig, *, fast: bool) -> str:
    """What makes this pack again."""
    sizes = "" if config.prompts == LinearConfig().prompts else f" --prompts {config.prompts}"
    return f"edge-align export pack --model {base.id} --recipe linear{' --fast' if fast else sizes}"


def _texts_id(base: BaseModel, config: LinearConfig, *, fast: bool) -> str:
    """Names the kept answers and activations: everything one depends on; more prompts add to what is there."""
    settings = [config.answers, config.max_tokens, config.seed, config.first_layer, config.last_layer]
    return hashlib.sha256(json.dumps([base.hash, fast, *settings]).encode()).hexdigest()[:12]


def steered_layers(base: BaseModel, config: LinearConfig) -> range:
    """Blocks that a pack steers; block 0 never, at least one."""
    first = max(1, round(config.first_layer * base.n_layer))
    return range(first, max(first + 1, round(config.last_layer * base.n_layer) + 1))


def _read_activations(
    base: BaseModel,
    passes: Passes,
    answers: Answers,
    layers: range,
    *,
    work: Path,
    tell: Callable[[float], None],
) -> np.ndarray:
    """What `sample_answers` reads while it samples, of texts that are there already."""
    parts = []
    size = 64
    room = max(map(len, answers.completions))
    total = PositionSums(room, len(layers), base.d_model)
    for start in range(0, len(answers), size):
        path = work / f"deep-{start:06d}.npz"
        chunk = slice(start, start + size)
        n = len(answers.completions[chunk])
        shape = (room, len(layers), base.d_model)
        states = kept_arrays(path, means=(n, *shape[1:]), sums=shape, counts=shape[:1])
        if states is None:
            pairs = list(zip(answers.prompts[chunk], answers.completions[chunk], strict=True))
            here = PositionSums(*shape)
            means = passes.mean_hidden(
                [[*prompt, *answer] for prompt, answer in pairs],
                [(len(prompt), len(prompt) + len(answer)) for prompt, answer in pairs],
                list(layers),
                positions=here,
            )
            states = {"means": means, "sums": here.sums, "counts": here.counts}
            keep_arrays(path, **states)
        parts.append(states["means"])
        total.sums += states["sums"]
        total.counts += states["counts"]
        tell((start + n) / len(answers))
    lengths = np.array([len(tokens) for tokens in answers.completions])
    return centred(np.concatenate(parts), lengths, total.sums, total.counts)


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
    encoder = open_encoder(base.path)
    features = encoder.encode(answers.completions)
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
    work: Path,
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
    tell = stage("metric")
    path = work / f"metric-{hashlib.sha256(linear.decoder.tobytes()).hexdigest()[:12]}.npz"
    kept = kept_arrays(path, metric=(k, k))
    if kept is None:
        metric = fisher_metric(backend, probe(0), pack.decode, k=k, step=config.metric_step, tell=tell)
        keep_arrays(path, metric=metric)
    else:
        metric = kept["metric"]
    tell(1.0)
    tell = stage("KL curve")
    other = probe(3)
    texts = [backend.detokenize(tokens) for tokens in answers.completions]
    quadratic, measured = [], []
    for i in range(config.curve_points):
        # every third one random, the others where somebody's verdicts point, as a profile will; each both ways
        z = taste(linear.latents, texts, answers.groups, rng) if i % 3 else rng.standard_normal(k)
        q = np.exp(np.log(0.02) + (np.log(2.0) - np.log(0.02)) * (i + 0.5) / config.curve_points)
        for way in (1, -1):
            step = (way * z * np.sqrt(2 * q / (z @ metric @ z))).astype(np.float32)
            quadratic.append(q)
            measured.append(measured_kl(backend, other, pack.decode(step)))
        tell((i + 1) / config.curve_points)
    curve = fit_kl_curve(np.array(quadratic), np.array(measured))
    error = np.log(measured) - np.log([kl_of_quadratic(q, curve) for q in quadratic])
    health = {
        "kl_factor_median": round(float(np.exp(np.median(np.abs(error)))), 3),
        "kl_factor_worst": round(float(np.exp(np.abs(error).max())), 3),
    }
    return _Measured(replace(pack, metric=metric, kl_curve=curve), health)


def taste(latents: np.ndarray, texts: Sequence[str], groups: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Direction (k,) of a simulated person's verdicts on 20 to 100 prompts; the people are those of validation."""
    judge = MORE_USERS[int(rng.integers(len(MORE_USERS)))].judge
    asked = np.unique(groups)
    total = np.zeros(latents.shape[1])
    for group in rng.permutation(asked)[: rng.integers(min(20, len(asked)), min(100, len(asked)) + 1)]:
        rows = np.flatnonzero(groups == group)
        scores = [judge(texts[int(row)]) for row in rows]
        total += latents[rows[int(np.argmax(scores))]] - latents[rows[int(np.argmin(scores))]]
    return total if total.any() else np.asarray(rng.standard_normal(len(total)))


def _closed_loop(
    base: BaseModel,
    passes: Passes,
    answers: Answers,
    pack: LatentPack,
    config: LinearConfig,
    rng: np.random.Generator,
    *,
    tell: Callable[[float], None],
) -> dict[str, float]:
    """Inject random latents, generate, encode the answers: how much of a latent comes back, and how straight.

    Every latent is injected both ways, and half the difference counts: what any steering does to answers cancels.
    loop_gain is the regression of what comes back on what went in; loop_cosine is the angle of the mean response to
    one latent, over `loop_prompts` prompts.
    """
    encoder = open_encoder(base.path)
    groups = rng.choice(np.unique(answers.groups), size=config.loop_prompts, replace=False)
    prompts = [answers.prompts[int(np.flatnonzero(answers.groups == group)[0])] for group in groups]
    sampling = SamplingConfig(max_tokens=config.loop_tokens, seed=config.seed + 99)

    def mean_latent(z: np.ndarray) -> np.ndarray:
        made = passes.sample(prompts, sampling=sampling, vectors=[pack.decode(z)] * len(prompts))
        latents: np.ndarray = pack.encode(encoder.encode([tokens or [0] for tokens in made])).mean(0)
        return latents

    sent, back = [], []
    for i in range(config.loop_latents):
        z = rng.standard_normal(pack.k).astype(np.float32)
        z *= pack.scale_for(z[None], config.loop_kl)
        sent.append(z)
        back.append((mean_latent(z) - mean_latent(-z)) / 2)
        tell((i + 1) / config.loop_latents)
    a, b = np.stack(sent), np.stack(back)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    gain, cosine = (a * b).sum() / (a * a).sum(), ((a * b).sum(1) / norms).mean()
    return {"loop_gain": round(float(gain), 3), "loop_cosine": round(float(cosine), 3)}
