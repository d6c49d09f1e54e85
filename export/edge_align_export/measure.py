"""What a finished pack is worth: its metric and KL curve, and whether what is injected comes back."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from edge_align.bases import BaseModel
from edge_align.config import SamplingConfig
from edge_align.features import open_encoder
from edge_align.kl import measured_kl, open_probe, Probe
from edge_align.pack import fit_kl_curve, kl_of_quadratic, LatentPack
from edge_align.runtime.llamacpp import LlamaCppBackend
from edge_align.simulation.users import MORE_USERS
from edge_align_export.linear import LinearConfig, LinearPack
from edge_align_export.metric import fisher_metric
from edge_align_export.passes import Passes
from edge_align_export.texts import Answers, keep_arrays, kept_arrays


@dataclass(frozen=True)
class Measured:
    pack: LatentPack
    health: dict[str, float]


def measure(
    base: BaseModel,
    backend: LlamaCppBackend,
    answers: Answers,
    linear: LinearPack,
    config: LinearConfig,
    rng: np.random.Generator,
    work: Path,
    stage: Callable[[str], Callable[[float], None]],
) -> Measured:
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
        **linear.tensors(),
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
    return Measured(replace(pack, metric=metric, kl_curve=curve), health)


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


def closed_loop(
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
