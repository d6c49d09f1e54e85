"""Latent DPO written out from its formulas: one row, one draw, one density at a time, in float64.

Sources: arXiv 2412.20834 (Latent DPO) and arXiv 2402.01306 (KTO, eq. 7-8).
"""

import numpy as np


def log_normal(z, mean, variance):
    """log N(z; mean, diag(variance))."""
    return sum(-0.5 * np.log(2 * np.pi * v) - (x - m) ** 2 / (2 * v) for x, m, v in zip(z, mean, variance, strict=True))


def policy_reward(z, mu):
    """g(z) = log p(z) - log N(z; 0, I), p = N(mu, I)."""
    ones = np.ones(len(z))
    return log_normal(z, mu, ones) - log_normal(z, 0 * ones, ones)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def pair_loss(mu, better, worse, weight, beta):
    """Sum over pairs of the mean over their ordered draws; a negative weight prefers the other draw."""
    total = 0.0
    for a_draws, b_draws, w in zip(better, worse, weight, strict=True):
        losses = []
        for a, b in zip(a_draws, b_draws, strict=True):
            gap = policy_reward(a, mu) - policy_reward(b, mu)
            losses.append(-np.log(sigmoid(beta * gap * (1 if w > 0 else -1))))
        total += abs(w) * np.mean(losses)
    return total


def reference_point(mu, rated, beta):
    """KTO's z0 with r = mu . z: r's other part, |mu|^2 / 2, is the same for all answers."""
    return max(0.0, np.mean([beta * float(mu @ z) for z in rated]))


def rating_loss(mu, rated, up, down, beta, *, zero):
    """KTO's loss with the weights `up` of thumbs up and `down` of thumbs down, times two."""
    total = 0.0
    for z, w_up, w_down in zip(rated, up, down, strict=True):
        r = beta * float(mu @ z)
        total += w_up * (1 - sigmoid(r - zero)) + w_down * (1 - sigmoid(zero - r))
    return 2 * total


def draw_contrasts(chosen, rejected, variance, *, draws, share, rng):
    """z_a - z_b (s, k) of the ordered pairs of draws with the largest reward gaps, `share` of them, for one pair."""
    ones = np.ones(len(chosen))
    z = [rng.normal(size=len(ones)) for _ in range(draws)]
    for mean in (chosen, rejected):
        z += [mean + np.sqrt(variance) * rng.normal(size=len(ones)) for _ in range(draws)]
    reward = [sigmoid(log_normal(x, chosen, variance) - log_normal(x, rejected, variance)) for x in z]
    ordered = sorted(
        ((i, j) for i in range(len(z)) for j in range(len(z))), key=lambda ij: reward[ij[1]] - reward[ij[0]]
    )
    return np.array([z[i] - z[j] for i, j in ordered[: int(len(ordered) * share)]])


def optimum(contrasts, weight, *, beta, ridge):
    """The minimiser of the regularised pair loss by Newton's method. contrasts (n, s, k), weight (n,) > 0."""
    n, s, k = contrasts.shape
    rows = contrasts.reshape(n * s, k).astype(np.float64)
    each = np.repeat(weight / s, s)
    mu = np.zeros(k)
    for _ in range(50):
        p = sigmoid(-beta * rows @ mu)
        gradient = -beta * rows.T @ (each * p) + ridge * mu
        hessian = beta**2 * rows.T @ (rows * (each * p * (1 - p))[:, None]) + ridge * np.eye(k)
        mu = mu - np.linalg.solve(hessian, gradient)
    assert np.abs(gradient).max() < 1e-9
    return mu
