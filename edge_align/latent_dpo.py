"""Latent DPO: learning a person's p(z|x) from latents alone (arXiv 2412.20834, section on Latent DPO).

For a pair, latents are drawn from the prior N(0, I) and from the posteriors q(z|x, chosen), q(z|x, rejected). The
density ratio of the two posteriors ranks the draws; the policy is trained by

    loss = - log sigmoid( beta * ( g(z_a) - g(z_b) ) )   over ordered pairs (a ranked above b),
    g(z) = log p(z|x) - log N(z; 0, I).

The policy is a Gaussian with the prior's own variance and mean mu(x), so g(z_a) - g(z_b) = mu . (z_a - z_b): the loss
is convex in mu, flipping a pair's label flips the sign of its draws' differences, and no draw has to be repeated while
training. So many fits (cross-validation folds x label permutations) run as one batch. A learnt diagonal variance was
tried and predicts worse (docs/decisions/0005); only the mean acts at inference. The language model never runs here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

CONTRAST_BUDGET = 2_048
"""Contrasts in all that a fit works on, as far as every pair has one: bounds its time and memory."""


@dataclass(frozen=True, slots=True)
class LatentDPOConfig:
    """Hyper-parameters; `docs/decisions/` says how each was measured."""

    beta: float = 0.1  # DPO temperature (paper, table of hyper-parameters)
    draws: int = 16  # latents from each of prior, q(chosen), q(rejected)
    evidence: float = 0.25  # share of ordered pairs of draws kept, largest reward gaps first
    contrasts: int = 2  # of those, how many are used per pair (an unbiased subsample)
    prior_precision: float = 32.0  # L2 on beta mu
    max_norm: float = 8.0  # |mu| is clipped here, about the prior's own radius
    head_precision: float = 8.0  # L2 on the prompt-dependent head
    head_rank: int = 2
    steps: int = 30


@dataclass(frozen=True, slots=True)
class LatentFeedback:
    """Feedback as training sees it: posterior means in the pack's latent space, no text.

    chosen, rejected (n, k); rated (m, k); rated_up (m,) bool; features of the prompts (n, p), (m, p);
    weights (n,), (m,); groups (n,), (m,) int, equal for equal prompts. All float32 unless said.
    """

    chosen: np.ndarray
    rejected: np.ndarray
    pair_features: np.ndarray
    pair_weight: np.ndarray
    pair_group: np.ndarray
    rated: np.ndarray
    rated_up: np.ndarray
    rated_features: np.ndarray
    rated_weight: np.ndarray
    rated_group: np.ndarray

    @property
    def k(self) -> int:
        return int(self.chosen.shape[1])


@dataclass(frozen=True, slots=True)
class Contrasts:
    """Fixed draws as statistics of the policy: pairs (n, S, k) holds z_a - z_b; rated (m, S, k) holds z."""

    pairs: torch.Tensor
    rated: torch.Tensor


def draw_contrasts(feedback: LatentFeedback, variance: np.ndarray, *, config: LatentDPOConfig, seed: int) -> Contrasts:
    """Sample latents and keep the contrasts with the clearest reward gap. variance (k,): the posteriors' own."""
    rng = torch.Generator().manual_seed(seed)
    var = torch.from_numpy(np.array(variance, dtype=np.float32))
    chosen, rejected = torch.from_numpy(feedback.chosen), torch.from_numpy(feedback.rejected)
    n, k, d = len(chosen), feedback.k, config.draws
    # log q(z|chosen) - log q(z|rejected) = u . z + const, so the ranking sees a draw only through u . z. Given that,
    # the rest of the draw is noise: it is integrated out (Rao-Blackwell) instead of sampled (docs/decisions/0005).
    u = (chosen - rejected) / var
    centre = torch.stack([torch.zeros_like(chosen), chosen, rejected], 1)  # (n, 3, k): prior, chosen, rejected
    spread = torch.stack([torch.ones_like(var), var, var])[None]  # (1, 3, k) variances
    direction = spread * u[:, None]
    score_var = (direction * u[:, None]).sum(-1, keepdim=True).clamp(min=1e-12)  # (n, 3, 1) of u . z
    noise = torch.randn(n, 3, d, generator=rng)
    at = noise * score_var.sqrt()  # u . (z - centre) of each draw
    mean = centre[:, :, None] + direction[:, :, None] * (at / score_var)[..., None]  # E[z | u . z], (n, 3, d, k)
    z = mean.flatten(1, 2)
    offset = (chosen**2 - rejected**2) / (2 * var)
    reward = torch.sigmoid((z * u[:, None]).sum(-1) - offset.sum(-1)[:, None])  # the paper's, in (0, 1)
    gap = (reward[:, :, None] - reward[:, None, :]).flatten(1)  # (n, (3d)^2): first draw minus second
    kept = int(gap.shape[1] * config.evidence)
    best = gap.topk(kept, dim=1).indices if n else gap.new_zeros((0, kept), dtype=torch.long)
    # the contrasts of a pair are nearly parallel, so few will do; with thousands of pairs, one each
    used = max(1, min(config.contrasts, CONTRAST_BUDGET // max(1, n)))
    pick = best.gather(1, torch.randint(kept, (n, used), generator=rng))
    better, worse = (index[..., None].expand(-1, -1, k) for index in (pick // (3 * d), pick % (3 * d)))
    return Contrasts(z.gather(1, better) - z.gather(1, worse), torch.from_numpy(feedback.rated)[:, None])


def latent_dpo_loss(
    theta: torch.Tensor,
    contrasts: Contrasts,
    pair_weight: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    beta: float,
) -> torch.Tensor:
    """Loss of V policies at once, summed over rows, before regularisation.

    theta (V, k) means; pair_weight (V, n), negative for a flipped pair; up, down (V, m) weights
    of the ratings under each labelling. Ratings take the KTO form (arXiv 2402.01306, eq. 7-8) on latents.
    Returns (V,).
    """
    loss = theta.new_zeros(len(theta))
    if contrasts.pairs.shape[0]:
        n, s, _ = contrasts.pairs.shape
        gap = beta * (theta @ contrasts.pairs.flatten(0, 1).T).view(-1, n, s)
        sign, weight = pair_weight.sign(), pair_weight.abs()
        loss = loss + (F.softplus(-gap * sign[..., None]).mean(-1) * weight).sum(-1)
    if contrasts.rated.shape[0]:
        m, s, _ = contrasts.rated.shape
        ratio = beta * (theta @ contrasts.rated.flatten(0, 1).T).view(-1, m, s)
        # The reference point is the policy's mean log-ratio over all rated answers: with a prompt-independent
        # policy every answer is as good a mismatch as any other.
        seen = (up + down).clamp(max=1.0)
        zero = ((ratio.mean(-1) * seen).sum(-1) / seen.sum(-1).clamp(min=1.0)).clamp(min=0.0).detach()[:, None, None]
        value_up = 1 - torch.sigmoid(ratio - zero)
        value_down = 1 - torch.sigmoid(zero - ratio)
        # twice, so that at theta = 0 a rating pulls as hard as a pair: the sigmoid's slope is 1/4, softplus's 1/2
        loss = loss + 2 * ((value_up.mean(-1) * up) + (value_down.mean(-1) * down)).sum(-1)
    return loss


def balance(labels: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """KTO weights of ups and downs so that neither side outweighs the other. (V, m) bool, (V, m) -> two (V, m)."""
    up, down = weight * labels, weight * ~labels
    n_up, n_down = up.sum(-1, keepdim=True), down.sum(-1, keepdim=True)
    total = (n_up + n_down) / 2
    both = (n_up > 0) & (n_down > 0)
    up = torch.where(both, up * total / n_up.clamp(min=1e-9), up)
    down = torch.where(both, down * total / n_down.clamp(min=1e-9), down)
    return up, down


def fit_batch(
    contrasts: Contrasts,
    pair_weight: torch.Tensor,
    rated_labels: torch.Tensor,
    rated_weight: torch.Tensor,
    *,
    k: int,
    config: LatentDPOConfig,
) -> torch.Tensor:
    """Means (V, width) of V policies by accelerated gradient descent from the prior's (zero).

    width is k, or k + k p with a prompt head (`with_head`). pair_weight (V, n): 0 leaves a pair out, a negative
    weight flips it. rated_labels, rated_weight (V, m).
    Deterministic. The step is 1 / L with L a bound on the loss's curvature, so no learning rate is tuned.
    """
    versions = pair_weight.shape[0]
    width = contrasts.pairs.shape[2]
    up, down = balance(rated_labels, rated_weight)
    precision = [config.prior_precision] * k + [config.head_precision] * (width - k)
    ridge = torch.tensor(precision) * config.beta**2
    rows = []  # a bound of the Hessian is rows' rows: softplus bends by at most 1/4, 2 sigmoid by less than 1/5
    for found, weight, bend in ((contrasts.pairs, pair_weight, 0.25), (contrasts.rated, up + down, 0.2)):
        if weight.numel():
            rows.append(found.flatten(0, 1) * (bend * weight.abs().max() / found.shape[1]).sqrt())
    design = torch.cat(rows) if rows else torch.zeros(1, width)
    gram = design @ design.T if len(design) < width else design.T @ design  # the same largest eigenvalue
    curvature = config.beta**2 * torch.linalg.eigvalsh(gram)[-1] + ridge.max()
    theta = torch.zeros(versions, width)
    ahead = theta
    for step in range(config.steps):
        point = ahead.detach().requires_grad_()
        loss = latent_dpo_loss(point, contrasts, pair_weight, up, down, config.beta).sum()
        (gradient,) = torch.autograd.grad(loss + 0.5 * (point**2 * ridge).sum(), point)
        moved = point.detach() - gradient / curvature
        ahead = moved + (step / (step + 3)) * (moved - theta)
        theta = moved
    return theta


def with_head(contrasts: Contrasts, feedback: LatentFeedback) -> Contrasts:
    """Contrasts of a policy with mean mu + A f(x): (z_a - z_b) f(x)' joins them, (.., k + k p)."""
    k = feedback.k

    def extended(rows: torch.Tensor, features: np.ndarray) -> torch.Tensor:
        outer = rows[:, :, :k, None] * torch.from_numpy(features)[:, None, None, :]
        return torch.cat([rows, outer.flatten(2)], -1)

    return Contrasts(
        extended(contrasts.pairs, feedback.pair_features), extended(contrasts.rated, feedback.rated_features)
    )


def fit(contrasts: Contrasts, feedback: LatentFeedback, *, config: LatentDPOConfig) -> np.ndarray:
    """Mean (k,) float32 of a prompt-independent p(z), from all rows."""
    return clip_norm(_fit_all(contrasts, feedback, config=config).numpy(), config.max_norm)


def fit_head(
    contrasts: Contrasts, feedback: LatentFeedback, *, config: LatentDPOConfig
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """mean (k,), head_in (r, p), head_out (k, r): the mean of p(z|x) is mean + head_out @ head_in @ f(x)."""
    k = feedback.k
    theta = _fit_all(with_head(contrasts, feedback), feedback, config=config).numpy()
    u, s, vt = np.linalg.svd(theta[k:].reshape(k, -1), full_matrices=False)
    r = min(config.head_rank, len(s))
    norm = np.linalg.norm(theta[:k])
    shrink = min(1.0, config.max_norm / norm) if norm > 0 else 1.0
    return (
        clip_norm(theta[:k], config.max_norm),
        vt[:r].astype(np.float32),
        (u[:, :r] * s[:r] * shrink).astype(np.float32),
    )


def _fit_all(contrasts: Contrasts, feedback: LatentFeedback, *, config: LatentDPOConfig) -> torch.Tensor:
    return fit_batch(
        contrasts,
        torch.from_numpy(feedback.pair_weight)[None],
        torch.from_numpy(feedback.rated_up)[None],
        torch.from_numpy(feedback.rated_weight)[None],
        k=feedback.k,
        config=config,
    )[0]


def clip_norm(mean: np.ndarray, most: float) -> np.ndarray:
    """`mean` no longer than `most` (pitfall: latents far outside the prior were never seen)."""
    norm = float(np.linalg.norm(mean))
    return np.asarray(mean if norm <= most else mean * (most / norm), dtype=np.float32)
