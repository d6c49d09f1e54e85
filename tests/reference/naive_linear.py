"""Textbook versions of what the linear recipe computes, one group or one column at a time."""

import numpy as np


def within(values, groups):
    out = np.array(values, dtype=np.float64)
    for g in set(groups.tolist()):
        out[groups == g] -= np.mean([values[i] for i in range(len(values)) if groups[i] == g], axis=0)
    return out


def ridge(x, y, penalty):
    """Ridge regression as least squares with rows added to the data; the penalty is per unit of column variance."""
    spread = np.sqrt((np.asarray(x, dtype=np.float64) ** 2).mean(0))
    added = np.diag(np.sqrt(penalty * len(x)) * spread)
    tall = np.concatenate([x, added])
    target = np.concatenate([y, np.zeros((x.shape[1], y.shape[1]))])
    return np.linalg.lstsq(tall, target, rcond=None)[0]


def canonical_correlations(a, b):
    """Of the columns of a and b, largest first: singular values of Qa' Qb (Bjorck and Golub 1973)."""
    qa, qb = (np.linalg.qr(x - x.mean(0))[0] for x in (a, b))
    return np.linalg.svd(qa.T @ qb, compute_uv=False)
