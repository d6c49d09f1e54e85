"""Recipe `linear`: readout and decoder from forward passes only, by reduced-rank regression.

Answers of the base to one prompt differ in style and in content; their deep activations, centred within the prompt,
are regressed on the encoder's features, and the k directions of the fitted values that matter most become the latents
(reduced-rank regression, Izenman 1975). Latent DPO's prior is the same along every latent, so their scale says where it
looks first: the square root of how far the base's own answers spread along them (docs/decisions/0004). Pure numpy, no
model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from edge_align.config import bounded
from edge_align.pack import LatentPack

TENSORS = ("readout", "feature_mean", "baseline", "prompt_projection", "variance", "decoder")
"""What of a pack a recipe makes; the rest is measured afterwards."""

VARIANCE_FLOOR = 0.05
"""Of a latent's posterior, relative to the latent's own. A sharper posterior would be overconfident."""


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
    base_draws: int = 8  # samples over which the NLL of the base's own short answers is a mean
    seed: int = 1000

    def __post_init__(self) -> None:
        bounded(self.k, 2, 1024, "k")
        bounded(self.prompts, 8, 1200, "prompts")
        bounded(self.answers, 2, 64, "answers")


@dataclass(frozen=True)
class LinearPack:
    """The parts of a pack that need no engine. Shapes as in `edge_align.pack.LatentPack`."""

    readout: np.ndarray
    feature_mean: np.ndarray
    baseline: np.ndarray
    prompt_projection: np.ndarray
    variance: np.ndarray
    decoder: np.ndarray
    r2: float  # held-out R2 of the deep latents given the features
    spread: np.ndarray  # (k,) standard deviation of a latent over the base's answers to one prompt, largest first
    latents: np.ndarray  # (n, k) of the answers it was made from, centred within their prompt

    def tensors(self) -> dict[str, np.ndarray]:
        """What of it a pack holds."""
        return {name: getattr(self, name) for name in TENSORS}


def solve(
    *,
    features: np.ndarray,
    deep: np.ndarray,
    written: np.ndarray | None = None,
    groups: np.ndarray,
    prompt_features: np.ndarray,
    layers: range,
    n_layer: int,
    k: int,
    ridge: float,
    inputs: int,
) -> LinearPack:
    """features (n, f) of the answers; deep (n, len(layers), d) mean hidden states of `layers`; groups (n,) index of the
    prompt in prompt_features (n_prompt, p). `ridge` is relative to unit-variance features; `inputs`: size of the
    prompt head. written: the states that the decoder writes, `deep` unless given; what a latent is read from may say
    how long an answer is, what it is written with may not (docs/decisions/0004).
    """
    n, _, width = deep.shape
    mean = features.mean(0)
    f = within(features, groups)
    d = within(deep.reshape(n, -1), groups).reshape(deep.shape)
    scale = np.sqrt((d**2).mean((0, 2)))  # every layer has the same say
    target = (d / scale[None, :, None]).reshape(n, -1)
    fitted = np.linalg.qr(f, mode="r") @ ridge_regression(f, target, ridge)  # up to a rotation of the n rows
    _, vectors = np.linalg.eigh(fitted @ fitted.T)
    basis, _ = np.linalg.qr(fitted.T @ vectors[:, ::-1][:, :k])
    deep_latent = target @ basis
    readout = ridge_regression(f, deep_latent, ridge)
    z = f @ readout  # uncorrelated: the fitted values along their own principal axes
    natural = np.sqrt((z**2).mean(0)) + 1e-12
    # variances end as natural / mean: their own are too steep a prior, equal ones too flat
    factor = natural**-0.5 / np.sqrt(natural.mean())
    readout, z, deep_latent = readout * factor, z * factor, deep_latent * factor
    decoder = np.zeros((k, n_layer, width), np.float32)
    w = d if written is None else within(written.reshape(n, -1), groups).reshape(d.shape)
    decoder[:, list(layers)] = (z.T @ w.reshape(n, -1)).reshape(k, *d.shape[1:]) / n
    decoder[:, 0] = 0.0

    test = groups % 5 == 0
    partial = ridge_regression(f[~test], deep_latent[~test], ridge)
    error = (deep_latent[test] - f[test] @ partial) ** 2
    variance = np.maximum(error.mean(0), VARIANCE_FLOOR * (z**2).mean(0))

    return LinearPack(
        readout=readout.astype(np.float32),
        feature_mean=mean.astype(np.float32),
        baseline=_baseline((features - mean) @ readout, groups, prompt_features),
        prompt_projection=_project(prompt_features, inputs),
        variance=variance.astype(np.float32),
        decoder=decoder,
        r2=float(1 - error.sum() / (deep_latent[test] ** 2).sum()),
        spread=(natural * factor).astype(np.float32),
        latents=z.astype(np.float32),
    )


def retrained(
    pack: LinearPack,
    *,
    features: np.ndarray,
    groups: np.ndarray,
    prompt_features: np.ndarray,
    decoder: np.ndarray,
    readout: np.ndarray,
    variance: np.ndarray,
) -> LinearPack:
    """The pack with another decoder and readout, and everything that follows from them; arguments as for `solve`."""
    return replace(
        pack,
        decoder=decoder,
        readout=readout,
        variance=variance,
        baseline=_baseline((features - pack.feature_mean) @ readout, groups, prompt_features),
        latents=within(features, groups) @ readout,
    )


def reopened(pack: LatentPack, *, features: np.ndarray, groups: np.ndarray) -> LinearPack:
    """A finished pack as it was before it was measured, with the latents of these answers; arguments as for `solve`."""
    latents = within(features, groups) @ pack.readout
    return LinearPack(
        **{name: np.array(getattr(pack, name)) for name in TENSORS},
        r2=float(pack.manifest["health"]["r2"]),
        spread=latents.std(0),
        latents=latents,
    )


def within(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Subtract from every row the mean of its group, in float32."""
    n_groups = int(groups.max()) + 1
    sums = np.zeros((n_groups, values.shape[1]), np.float64)
    np.add.at(sums, groups, values)
    counts = np.bincount(groups, minlength=n_groups)[:, None]
    return np.asarray(values - (sums / np.maximum(counts, 1))[groups], dtype=np.float32)


def ridge_regression(x: np.ndarray, y: np.ndarray, ridge: float) -> np.ndarray:
    """Coefficients (p, q) of y on x, penalised by `ridge` in units of each column's variance."""
    spread = np.sqrt((x.astype(np.float64) ** 2).mean(0) + 1e-12)
    xs = x / spread
    gram = xs.T @ xs
    gram[np.diag_indices_from(gram)] += ridge * len(x)
    return np.asarray(np.linalg.solve(gram, xs.T @ y) / spread[:, None], dtype=np.float32)


def _baseline(latents: np.ndarray, groups: np.ndarray, prompt_features: np.ndarray) -> np.ndarray:
    """The mean latent of the answers to a prompt, linear in the prompt's features: (p + 1, k)."""
    present = np.unique(groups)
    per_prompt = np.stack([latents[groups == g].mean(0) for g in present])
    return _with_offset(prompt_features[present], per_prompt, 1.0)


def _with_offset(x: np.ndarray, y: np.ndarray, ridge: float) -> np.ndarray:
    """Ridge regression with an unpenalised offset as the last row: (p + 1, q)."""
    mean_x, mean_y = x.mean(0), y.mean(0)
    slope = ridge_regression(x - mean_x, y - mean_y, ridge)
    return np.concatenate([slope, (mean_y - mean_x @ slope)[None]]).astype(np.float32)


def _project(x: np.ndarray, inputs: int) -> np.ndarray:
    """Whitened leading principal components of the prompts' features, with the centring folded in: (p + 1, inputs)."""
    mean = x.mean(0)
    _, s, vt = np.linalg.svd(x - mean, full_matrices=False)
    n = min(inputs, int((s > 1e-4 * s[0]).sum()))  # fewer prompts than inputs: the other inputs are always 0
    directions = vt[:n].T / (s[:n] / np.sqrt(len(x)))
    out = np.zeros((x.shape[1] + 1, inputs), np.float32)
    out[:-1, :n] = directions
    out[-1, :n] = -mean @ directions
    return out
