"""Recipe `linear`: readout and decoder from forward passes only, by reduced-rank regression.

Answers of the base to one prompt differ in style and in content; their deep activations, centred within the prompt,
are regressed on the encoder's features, and the k directions of the fitted values that matter most become the latents
(reduced-rank regression, Izenman 1975). Latent DPO's prior is the same along every latent, so their scale says where it
looks first: the square root of how far the base's own answers spread along them (docs/decisions/0004). Pure numpy, no
model.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

VARIANCE_FLOOR = 0.05
"""Of a latent's posterior, relative to the latent's own. A sharper posterior would be overconfident."""


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


def solve(
    *,
    features: np.ndarray,
    deep: np.ndarray,
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
    prompt head.
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
    decoder[:, list(layers)] = np.einsum("nk,nld->kld", z, d) / n
    decoder[:, 0] = 0.0

    test = groups % 5 == 0
    partial = ridge_regression(f[~test], deep_latent[~test], ridge)
    error = (deep_latent[test] - f[test] @ partial) ** 2
    variance = np.maximum(error.mean(0), VARIANCE_FLOOR * (z**2).mean(0))

    described = np.concatenate([prompt_features, np.ones((len(prompt_features), 1), np.float32)], 1)
    raw = (features - mean) @ readout
    present = np.unique(groups)
    per_prompt = np.stack([raw[groups == g].mean(0) for g in present])
    return LinearPack(
        readout=readout.astype(np.float32),
        feature_mean=mean.astype(np.float32),
        baseline=_with_offset(prompt_features[present], per_prompt, 1.0),
        prompt_projection=_project(prompt_features, inputs, described.shape[1]),
        variance=variance.astype(np.float32),
        decoder=decoder,
        r2=float(1 - error.sum() / (deep_latent[test] ** 2).sum()),
        spread=(natural * factor).astype(np.float32),
        latents=z.astype(np.float32),
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


def _with_offset(x: np.ndarray, y: np.ndarray, ridge: float) -> np.ndarray:
    """Ridge regression with an unpenalised offset as the last row: (p + 1, q)."""
    mean_x, mean_y = x.mean(0), y.mean(0)
    slope = ridge_regression(x - mean_x, y - mean_y, ridge)
    return np.concatenate([slope, (mean_y - mean_x @ slope)[None]]).astype(np.float32)


def _project(x: np.ndarray, inputs: int, rows: int) -> np.ndarray:
    """Whitened leading principal components of the prompts' features, with the centring folded in: (p + 1, inputs)."""
    mean = x.mean(0)
    _, s, vt = np.linalg.svd(x - mean, full_matrices=False)
    n = min(inputs, int((s > 1e-4 * s[0]).sum()))  # fewer prompts than inputs: the other inputs are always 0
    directions = vt[:n].T / (s[:n] / np.sqrt(len(x)))
    out = np.zeros((rows, inputs), np.float32)
    out[:-1, :n] = directions
    out[-1, :n] = -mean @ directions
    return out
