"""Feedback of made-up people straight in latent space."""

import numpy as np

from edge_align.latent_dpo import LatentFeedback


def feedback(
    *, pairs=0, ratings=0, k=8, p=4, taste=None, noise=1.0, seed=0, per_prompt=1, head=None, offset=0.0
) -> LatentFeedback:
    """A verdict goes to the answer with the higher taste . z + noise; taste None: to either by chance.

    head (k, p): the taste of a prompt with features x is `taste + head @ x`.
    """
    rng = np.random.default_rng(seed)
    taste = np.zeros(k) if taste is None else np.asarray(taste)
    group = np.arange(pairs + ratings) // per_prompt
    described = rng.normal(size=(int(group.max(initial=-1)) + 1, p))[group]
    wants = np.broadcast_to(taste, (pairs + ratings, k)) + (0 if head is None else described @ head.T)
    a, b = rng.normal(size=(2, pairs, k)) + offset
    rated = rng.normal(size=(ratings, k)) + offset
    swap = ((a - b) * wants[:pairs]).sum(1) + noise * rng.normal(size=pairs) < 0
    a[swap], b[swap] = b[swap], a[swap]
    liked = (rated * wants[pairs:]).sum(1) + noise * rng.normal(size=ratings)
    f32 = np.float32
    return LatentFeedback(
        chosen=a.astype(f32),
        rejected=b.astype(f32),
        pair_features=described[:pairs].astype(f32),
        pair_weight=np.ones(pairs, f32),
        pair_group=group[:pairs],
        rated=rated.astype(f32),
        rated_up=liked > np.median(liked) if ratings else np.zeros(0, bool),
        rated_features=described[pairs:].astype(f32),
        rated_weight=np.ones(ratings, f32),
        rated_group=group[pairs:],
    )


def direction(k=8, size=3.0, seed=7):
    v = np.random.default_rng(seed).normal(size=k)
    return size * v / np.linalg.norm(v)


def cosine(a, b) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
