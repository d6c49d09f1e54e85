"""Is a profile better than chance? Cross-validation grouped by prompt, with a label-permutation p.

Flipping the label of a pair, or shuffling the labels of ratings, is exactly what "these verdicts mean nothing" says,
so the permutation p is valid at any sample size: shuffled labels pass a gate at level alpha in at most alpha of cases.
Every fold of every permutation is one row of a single batched fit (`latent_dpo.fit_batch`).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import numpy as np
import torch

from edge_align.latent_dpo import Contrasts, fit_batch, LatentDPOConfig, LatentFeedback, with_head

GATE_P = 0.02
"""A profile is switched on when its permutation p is at most this."""

GATE_Z = 2.3
"""The z at which p <= GATE_P becomes likely: the normal quantile 2.05 and some allowance."""

FOLDS = 10
MANY_ROWS = 100
"""Of more rows than this, four fifths teach as well as nine tenths, and half the folds take half the time."""

HEAD_ROWS = 40
"""Below this many rows a prompt-dependent head is not tried."""


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Cross-validated preference accuracy: how often a held-out verdict is predicted, with a 95 % Wilson interval."""

    accuracy: float
    ci_low: float
    ci_high: float
    p: float
    n: int
    z: float  # of the statistic among its permutations, in their standard deviations

    @property
    def passes(self) -> bool:
        return self.p <= GATE_P

    def more_rows(self) -> int | None:
        """About how many more rows would bring this evidence to the gate; None: no pattern yet. z grows with sqrt n."""
        if self.z < 0.5:
            return None
        return max(1, round(self.n * ((GATE_Z / self.z) ** 2 - 1)))

    def to_dict(self) -> dict[str, float]:
        return {"accuracy": self.accuracy, "ci_low": self.ci_low, "ci_high": self.ci_high, "p": self.p, "n": self.n}


def folds(groups: np.ndarray, *, most: int, seed: int) -> np.ndarray:
    """A fold number for every row; rows of one group share a fold. groups (n,) int -> (n,) int."""
    unique, inverse = np.unique(groups, return_inverse=True)
    order = np.random.default_rng(seed).permutation(len(unique))
    return (order % min(most, max(2, len(unique))))[inverse]


def wilson(correct: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson score interval of a proportion (Wilson 1927, eq. 4)."""
    if n == 0:
        return 0.0, 1.0
    p = correct / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def cross_validate(
    feedback: LatentFeedback,
    contrasts: Contrasts,
    *,
    config: LatentDPOConfig,
    permutations: int = 199,
    seed: int = 0,
) -> HeldOut:
    """Held-out accuracy and its permutation p.

    The statistic is the mean over held-out rows of the squashed margin, which has more power than the accuracy
    itself at ten or twenty rows; the accuracy is what is reported.
    """
    n, m = len(feedback.chosen), len(feedback.rated)
    rng = np.random.default_rng(seed + 1)
    most = FOLDS if n + m <= MANY_ROWS else FOLDS // 2
    fold = folds(np.concatenate([feedback.pair_group, feedback.rated_group]), most=most, seed=seed)
    n_folds = int(fold.max()) + 1
    versions = permutations + 1
    flips = rng.integers(0, 2, (versions, n)) * 2 - 1
    flips[0] = 1
    labels = np.stack([feedback.rated_up] + [rng.permutation(feedback.rated_up) for _ in range(permutations)])
    train = fold[None] != np.arange(n_folds)[:, None]  # (n_folds, n + m)
    pair_weight = (flips[:, None] * train[None, :, :n] * feedback.pair_weight).reshape(versions * n_folds, n)
    rated_weight = np.broadcast_to(train[None, :, n:] * feedback.rated_weight, (versions, n_folds, m)).reshape(
        versions * n_folds, m
    )
    rated_labels = np.repeat(labels, n_folds, axis=0).reshape(versions * n_folds, m)
    theta = fit_batch(
        contrasts,
        torch.from_numpy(pair_weight.astype(np.float32)),
        torch.from_numpy(rated_labels),
        torch.from_numpy(np.array(rated_weight, dtype=np.float32)),
        k=feedback.k,
        config=config,
    ).view(versions, n_folds, -1)
    margins = held_out_margins(feedback, theta, fold) * np.concatenate([flips, labels * 2 - 1], axis=1)
    scale = np.sqrt((margins**2).mean(1, keepdims=True)) + 1e-12
    statistic = np.tanh(margins / scale).mean(1)
    correct = float((margins[0] > 0).sum() + 0.5 * (margins[0] == 0).sum())
    low, high = wilson(correct, n + m)
    p = float((statistic >= statistic[0] - 1e-12).sum()) / versions
    spread = float(statistic[1:].std())
    z = float(statistic[0] - statistic[1:].mean()) / spread if spread > 1e-9 else 0.0
    return HeldOut(accuracy=correct / (n + m), ci_low=low, ci_high=high, p=p, n=n + m, z=z)


def held_out_margins(feedback: LatentFeedback, theta: torch.Tensor, fold: np.ndarray) -> np.ndarray:
    """How far each row is on the side "chosen" or "up" when its fold was left out. theta (V, folds, k) -> (V, n + m).

    A pair's margin is the difference of the policy's log-ratio at the two posterior means. A rating's is its
    log-ratio against the mean over the rated answers that were trained on.
    """
    n = len(feedback.chosen)
    rows = np.concatenate([feedback.chosen - feedback.rejected, feedback.rated])
    scores = (theta @ torch.from_numpy(rows).T).numpy()  # (V, folds, n + m)
    own = scores[:, fold, np.arange(len(fold))]
    if len(feedback.rated):
        trained = fold[None, n:] != np.arange(theta.shape[1])[:, None]
        level = (scores[:, :, n:] * trained).sum(-1) / np.maximum(trained.sum(-1), 1)  # (V, folds)
        own[:, n:] -= level[:, fold[n:]]
    return np.asarray(own)


def compare_on_new(
    feedback: LatentFeedback,
    contrasts: Contrasts,
    new: np.ndarray,
    active: np.ndarray,
    *,
    config: LatentDPOConfig,
    seed: int = 0,
) -> tuple[float, float]:
    """How many of the rows `new` (n + m,) bool a refit predicts, and how many the mean `active` (k,) does, as shares.

    The refit is cross-validated over all rows, and `active` was learnt before the new ones, so neither has seen them.
    """
    n = len(feedback.chosen)
    fold = folds(np.concatenate([feedback.pair_group, feedback.rated_group]), most=FOLDS, seed=seed)
    n_folds = int(fold.max()) + 1
    train = (fold[None] != np.arange(n_folds)[:, None]).astype(np.float32)
    labels = np.broadcast_to(feedback.rated_up, (n_folds, len(feedback.rated))).copy()
    theta = fit_batch(
        contrasts,
        torch.from_numpy(train[:, :n] * feedback.pair_weight),
        torch.from_numpy(labels),
        torch.from_numpy(train[:, n:] * feedback.rated_weight),
        k=feedback.k,
        config=config,
    )
    known = torch.from_numpy(np.broadcast_to(active, theta.shape).astype(np.float32).copy())
    signs = np.concatenate([np.ones(n), feedback.rated_up * 2.0 - 1.0])
    margins = held_out_margins(feedback, torch.stack([theta, known]), fold) * signs
    right = (margins > 0) + 0.5 * (margins == 0)
    return float(right[0, new].mean()), float(right[1, new].mean())


def split_half_reliability(
    feedback: LatentFeedback, contrasts: Contrasts, *, config: LatentDPOConfig, splits: int = 24, seed: int = 0
) -> float:
    """How well the learnt direction would come out again from fresh feedback, 0 to 1.

    Prompts are split into halves at random; c is the mean cosine between the two halves' directions, and
    2c / (1 + c) steps it up to all rows (Spearman 1910, Brown 1910). Noise gives about 0, whatever its amount.
    """
    n, m = len(feedback.chosen), len(feedback.rated)
    rng = np.random.default_rng(seed + 2)
    groups = np.concatenate([feedback.pair_group, feedback.rated_group])
    unique, inverse = np.unique(groups, return_inverse=True)
    if len(unique) < 4:
        return 0.0
    halves = []
    for _ in range(splits):
        first = (rng.permutation(len(unique)) < len(unique) // 2)[inverse]
        halves += [first, ~first]
    inside = np.stack(halves).astype(np.float32)
    theta = fit_batch(
        contrasts,
        torch.from_numpy(inside[:, :n] * feedback.pair_weight),
        torch.from_numpy(np.broadcast_to(feedback.rated_up, (2 * splits, m)).copy()),
        torch.from_numpy(inside[:, n:] * feedback.rated_weight),
        k=feedback.k,
        config=config,
    )
    a, b = theta[0::2], theta[1::2]
    cosine = float(torch.nn.functional.cosine_similarity(a, b, dim=1).mean())
    return 2 * cosine / (1 + cosine) if cosine > 0.0 else 0.0


def earns_head(feedback: LatentFeedback, contrasts: Contrasts, *, config: LatentDPOConfig, seed: int = 0) -> bool:
    """Does a prompt-dependent mean predict held-out pairs better than a constant one, by two standard errors?"""
    n = len(feedback.chosen)
    if n + len(feedback.rated) < HEAD_ROWS or n < HEAD_ROWS // 2:
        return False
    fold = folds(np.concatenate([feedback.pair_group, feedback.rated_group]), most=5, seed=seed)
    n_folds = int(fold.max()) + 1
    train = (fold[None] != np.arange(n_folds)[:, None]).astype(np.float32)
    m = len(feedback.rated)
    losses = []
    for design in (contrasts, with_head(contrasts, feedback)):
        theta = fit_batch(
            design,
            torch.from_numpy(train[:, :n] * feedback.pair_weight),
            torch.from_numpy(np.broadcast_to(feedback.rated_up, (n_folds, m)).copy()),
            torch.from_numpy(train[:, n:] * feedback.rated_weight),
            k=feedback.k,
            config=config,
        )
        margin = config.beta * torch.einsum("nsw,nw->n", design.pairs, theta[fold[:n]]) / design.pairs.shape[1]
        losses.append(torch.nn.functional.softplus(-margin).numpy())
    gain = losses[0] - losses[1]
    return bool(gain.mean() > 2 * gain.std() / np.sqrt(n))
