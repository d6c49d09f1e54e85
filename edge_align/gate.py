"""Is a profile better than chance? Cross-validation grouped by prompt, and a label-permutation p.

Flipping the label of a pair, or shuffling the labels of ratings, is exactly what "these verdicts mean nothing" says,
so the permutation p is valid at any sample size: shuffled labels pass a gate at level alpha in at most alpha of cases.
What is permuted is how far the verdicts on each prompt agree with those on all others (docs/decisions/0006).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import numpy as np
import torch

from edge_align.latent_dpo import Contrasts, fit_batch, LatentDPOConfig, LatentFeedback, with_head

GATE_P = 0.02
"""A profile is switched on when its permutation p is at most this."""

RETIRE_P = 0.2
"""Looked at again and again, chance passes now and then: a version is switched off when all verdicts have a p above."""

GATE_Z = 2.3
"""The z at which p <= GATE_P becomes likely: the normal quantile 2.05 and some allowance."""

FOLDS = 10
MANY_ROWS = 100
"""Of more rows than this, four fifths teach as well as nine tenths, and half the folds take half the time."""

MIN_PROMPTS = 4
"""Verdicts on fewer prompts than this say nothing about a direction beyond these prompts."""

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
    """Held-out accuracy of the policy, and the permutation p of the verdicts' agreement across prompts.

    The accuracy is what is reported; at ten or twenty rows it is too coarse to decide by.
    """
    n, m = len(feedback.chosen), len(feedback.rated)
    groups = np.concatenate([feedback.pair_group, feedback.rated_group])
    fold = folds(groups, most=FOLDS if n + m <= MANY_ROWS else FOLDS // 2, seed=seed)
    theta = _left_out(feedback, contrasts, fold, config=config)
    margins = held_out_margins(feedback, theta[None], fold)[0] * np.concatenate(
        [np.ones(n), feedback.rated_up * 2.0 - 1]
    )
    correct = float((margins > 0).sum() + 0.5 * (margins == 0).sum())
    low, high = wilson(correct, n + m)
    statistic = agreement(feedback, permutations=permutations, rng=np.random.default_rng(seed + 1))
    p = float((statistic >= statistic[0] - 1e-6 * abs(statistic[0])).sum()) / len(statistic)
    spread = float(statistic[1:].std())
    z = float(statistic[0] - statistic[1:].mean()) / spread if spread > 1e-9 else 0.0
    return HeldOut(accuracy=correct / (n + m), ci_low=low, ci_high=high, p=p, n=n + m, z=z)


def agreement(feedback: LatentFeedback, *, permutations: int, rng: np.random.Generator) -> np.ndarray:
    """How far verdicts on different prompts agree, as given and under permutations: (1 + permutations,).

    The sum of v_i . v_j over rows i, j of different prompts, v the chosen latent minus the rejected one, or a rated one
    times its label less the mean label: what the mean direction of all other prompts says of each row left out, summed.
    Rows are divided by the root of their length, so that no single one decides.
    """
    rows, groups = _rows(feedback)
    alike = (rows @ rows.T) * (groups[:, None] != groups[None])
    n = len(feedback.chosen)
    flips = rng.integers(0, 2, (permutations + 1, n)) * 2.0 - 1
    flips[0] = 1
    labels = _centred(feedback.rated_up)
    said = np.concatenate([flips, np.stack([labels, *(rng.permutation(labels) for _ in range(permutations))])], axis=1)
    return np.asarray(((said @ alike) * said).sum(1))


def _rows(feedback: LatentFeedback) -> tuple[np.ndarray, np.ndarray]:
    """What each verdict says before its label, (n + m, k), divided by the root of its length; its prompt, (n + m,)."""
    rows = np.concatenate([feedback.chosen - feedback.rejected, feedback.rated])
    weight = np.concatenate([feedback.pair_weight, feedback.rated_weight])
    length = np.linalg.norm(rows, axis=1)
    rows = rows * (weight / np.sqrt(np.maximum(length, 1e-12)))[:, None]
    return rows, np.concatenate([feedback.pair_group, feedback.rated_group])


def _centred(up: np.ndarray) -> np.ndarray:
    """Labels of ratings, +1 and -1, less their mean; (m,) bool -> (m,)."""
    labels = up * 2.0 - 1
    return np.asarray(labels - labels.mean() if len(labels) else labels)


def _left_out(
    feedback: LatentFeedback, contrasts: Contrasts, fold: np.ndarray, *, config: LatentDPOConfig
) -> torch.Tensor:
    """What `fit_batch` gives for the policies that are fitted without one fold each, (folds, width); fold (n + m,)."""
    n, m = len(feedback.chosen), len(feedback.rated)
    n_folds = int(fold.max()) + 1
    train = (fold[None] != np.arange(n_folds)[:, None]).astype(np.float32)
    return fit_batch(
        contrasts,
        torch.from_numpy(train[:, :n] * feedback.pair_weight),
        torch.from_numpy(np.broadcast_to(feedback.rated_up, (n_folds, m)).copy()),
        torch.from_numpy(train[:, n:] * feedback.rated_weight),
        k=feedback.k,
        config=config,
    )


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
    theta = _left_out(feedback, contrasts, fold, config=config)
    known = torch.from_numpy(np.broadcast_to(active, theta.shape).astype(np.float32).copy())
    signs = np.concatenate([np.ones(n), feedback.rated_up * 2.0 - 1.0])
    margins = held_out_margins(feedback, torch.stack([theta, known]), fold) * signs
    right = (margins > 0) + 0.5 * (margins == 0)
    return float(right[0, new].mean()), float(right[1, new].mean())


def direction_reliability(feedback: LatentFeedback) -> float:
    """How well the direction of the verdicts is known, 0 to 1: the squared cosine to expect with its true one.

    The squared length of the rows' sum is what the person's taste and chance put there together; agreement across
    prompts, brought to as many terms, is the taste's part alone, for chance does not agree with itself. Noise gives
    about 0, whatever its amount.
    """
    rows, groups = _rows(feedback)
    signed = rows * np.concatenate([np.ones(len(feedback.chosen)), _centred(feedback.rated_up)])[:, None]
    unique, inverse, counts = np.unique(groups, return_inverse=True, return_counts=True)
    if len(unique) < MIN_PROMPTS:
        return 0.0
    of_prompt = np.zeros((len(unique), feedback.k))
    np.add.at(of_prompt, inverse, signed)
    total = float((signed.sum(0) ** 2).sum())  # of all ordered pairs of rows; less those of one prompt: agreement
    terms = len(rows) ** 2 / (len(rows) ** 2 - int((counts**2).sum()))
    between = (total - float((of_prompt**2).sum())) * terms
    return min(1.0, max(0.0, between / total)) if total > 0.0 else 0.0


def earns_head(feedback: LatentFeedback, contrasts: Contrasts, *, config: LatentDPOConfig, seed: int = 0) -> bool:
    """Does a prompt-dependent mean predict held-out pairs better than a constant one, by two standard errors?"""
    n = len(feedback.chosen)
    if n + len(feedback.rated) < HEAD_ROWS or n < HEAD_ROWS // 2:
        return False
    fold = folds(np.concatenate([feedback.pair_group, feedback.rated_group]), most=5, seed=seed)
    losses = []
    for design in (contrasts, with_head(contrasts, feedback)):
        theta = _left_out(feedback, design, fold, config=config)
        margin = config.beta * torch.einsum("nsw,nw->n", design.pairs, theta[fold[:n]]) / design.pairs.shape[1]
        losses.append(torch.nn.functional.softplus(-margin).numpy())
    gain = losses[0] - losses[1]
    return bool(gain.mean() > 2 * gain.std() / np.sqrt(n))
