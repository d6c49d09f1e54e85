"""Recipe `score`: the decoder that moves latents furthest for their KL, solved from one backward pass an answer.

Let g be an answer's score, the gradient of log p(answer | prompt) by vectors added to some blocks' outputs, at zero. A
vector v changes the mean latent of sampled answers by E[z g.v] (the policy gradient: Williams 1992) and costs a KL of
E[(g.v)^2] / 2 an answer (the Fisher metric). So what moves a latent most for its KL is the natural gradient (Amari
1998) E[g g']^-1 E[g z]: the regression of latents on scores. To first order it is where CLaP's reconstruction and
contrast (`clap_loss`) lead, without their steps; docs/decisions/0012 has what it is worth.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from edge_align.config import bounded
from edge_align.runtime.torch_ref import LlamaReference
from edge_align_export.clap import Corpus
from edge_align_export.clap_loss import freeze
from edge_align_export.hooked import HookedModel
from edge_align_export.linear import LinearPack, ridge_regression, within
from edge_align_export.texts import keep_arrays, kept_arrays

ROWS = 16  # answers of one backward pass
KEPT = 128  # answers whose scores are kept together
UNIT = 0.25  # nats a token that a latent of 1 costs on average: about as with `linear`, and finite differences see it


@dataclass(frozen=True, slots=True)
class ScoreConfig:
    """Chosen on validation people (docs/decisions/0012)."""

    tokens: int = 96  # of each answer
    first_layer: float = 0.60  # of n_layer: blocks 18 to 21 of 30
    last_layer: float = 0.70
    ridge: float = 8.0

    def __post_init__(self) -> None:
        bounded(self.tokens, 1, 4096, "tokens of an answer")


def rescored(
    pack: LinearPack,
    model: LlamaReference | HookedModel,
    corpus: Corpus,
    layers: range,
    config: ScoreConfig,
    *,
    work: Path,
    tell: Callable[[float], None],
) -> tuple[LinearPack, float]:
    """The pack with a decoder solved from scores, and its gain to first order (`solve_decoder`)."""
    answers = corpus.answers
    decoder, gain = solve_decoder(
        read_scores(model, corpus, layers, tokens=config.tokens, work=work, tell=tell),
        pack.latents,
        answers.groups,
        layers=layers,
        n_layer=model.shape.n_layer,
        ridge=config.ridge,
        tokens=float(np.mean([min(len(said), config.tokens) for said in answers.completions])),
    )
    return replace(pack, decoder=decoder), gain


def read_scores(
    model: LlamaReference | HookedModel,
    corpus: Corpus,
    layers: range,
    *,
    tokens: int,
    work: Path,
    tell: Callable[[float], None],
) -> np.ndarray:
    """(n, len(layers) * d_model) float32: d log p / d v at v = 0 of the first `tokens` of every answer, all steered
    by v (contract 2), in nats. Kept in `work` part by part, so a stopped run goes on.
    """
    n, width = len(corpus.answers), len(layers) * model.shape.d_model
    parts = []
    for first in range(0, n, KEPT):
        rows = np.arange(first, min(first + KEPT, n))
        path = work / f"scores-{layers.start}-{layers.stop}-{tokens}-{first:06d}.npz"
        kept = kept_arrays(path, scores=(len(rows), width))
        if kept is None:
            split = [rows[i : i + ROWS] for i in range(0, len(rows), ROWS)]
            kept = {"scores": np.concatenate([_scores(model, corpus, part, layers, tokens) for part in split])}
            keep_arrays(path, **kept)
        parts.append(kept["scores"])
        tell((rows[-1] + 1) / n)
    return np.concatenate(parts)


def solve_decoder(
    scores: np.ndarray,
    latents: np.ndarray,
    groups: np.ndarray,
    *,
    layers: range,
    n_layer: int,
    ridge: float,
    tokens: float,
) -> tuple[np.ndarray, float]:
    """The decoder (k, n_layer, d_model), and how well it does, to first order, on the fifth of the prompts left out.

    scores (n, len(layers) * d_model), latents (n, k) and groups (n,) of the answers; both are centred within the
    prompt. tokens: how many of an answer the scores are of, on average. The second figure is the mean correlation of
    z.t and g.v, v = t W, over random directions t of latents, with W solved without those prompts: as many standard
    deviations of z.t does steering by v move an answer, for a KL of half a nat in all.
    """
    g, z = within(scores, groups), within(latents, groups)
    test = groups % 5 == 0
    efficiency = 0.0
    if 0 < test.sum() < len(test):
        efficiency = first_order_gain(ridge_regression(g[~test], z[~test], ridge).T, g[test], z[test])
    solved = ridge_regression(g, z, ridge).T
    solved *= np.sqrt(2 * UNIT * len(solved) * tokens / ((g @ solved.T) ** 2).mean(0).sum())
    decoder = np.zeros((z.shape[1], n_layer, scores.shape[1] // len(layers)), np.float32)
    decoder[:, list(layers)] = solved.reshape(len(solved), len(layers), -1)
    return decoder, efficiency


def first_order_gain(decoder: np.ndarray, scores: np.ndarray, latents: np.ndarray) -> float:
    """Mean correlation of z.t and g.(t W) over 64 random t: decoder (k, width), scores (n, width), latents (n, k)."""
    directions = np.random.default_rng(0).standard_normal((64, len(decoder)))
    moved, wanted = scores @ (decoder.T @ directions.T), latents @ directions.T
    power = np.sqrt((moved**2).sum(0) * (wanted**2).sum(0))
    return float(((moved * wanted).sum(0) / np.maximum(power, 1e-12)).mean())


def _scores(
    model: LlamaReference | HookedModel, corpus: Corpus, rows: np.ndarray, layers: range, tokens: int
) -> np.ndarray:
    batch = corpus.batch(rows, n=len(rows), device=model.device, tokens=tokens)
    vectors = torch.zeros(len(rows), len(layers), model.shape.d_model, device=model.device, requires_grad=True)
    nll = freeze(model, batch, layers).nll(vectors).sum()
    (slope,) = torch.autograd.grad(nll, vectors)
    return -slope.flatten(1).float().cpu().numpy()
