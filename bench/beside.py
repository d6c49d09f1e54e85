"""What trains through the base for every person beside ours: the arms' names, and what is said of their rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from edge_align.simulation.users import bootstrap_interval

OURS = "edge-align"


def at_our_kl(method: str) -> str:
    """The arm in which what was trained is scaled to the KL of ours."""
    return f"{method} at our KL"


def summary(rows: Sequence[dict[str, Any]], method: str) -> dict[str, Any]:
    """Per number of pairs: means of the arms, and ours less theirs by prompt, with its bootstrap interval."""
    found: dict[str, Any] = {}
    sizes = sorted({row["pairs"] for row in rows})
    won = {(row["arm"], row["pairs"], row["user"]): np.array(row["won"]) for row in rows}
    for size in sizes:
        own = [row for row in rows if row["pairs"] == size]
        arms = {row["arm"] for row in own}
        found[f"pairs_{size}"] = {
            arm: {
                name: float(np.mean([row[name] for row in own if row["arm"] == arm]))
                for name in ("win_rate", "nll_ratio", "distinct2_ratio", "seconds", "stored_bytes")
            }
            for arm in sorted(arms)
        }
    names = sorted({row["user"] for row in rows})
    theirs = (method, at_our_kl(method))
    against = [(size, arm, size) for size in sizes for arm in theirs]
    against += [(min(sizes), arm, 100) for arm in theirs if min(sizes) < 100]
    for ours, arm, size in against:
        both = [((OURS, ours, name), (arm, size, name)) for name in names]
        both = [(a, b) for a, b in both if a in won and b in won]
        if both:  # of those who have both: a person may tell too few pairs apart, or have no KL, if ours does not steer
            gain = np.mean([won[a] - won[b] for a, b in both], axis=0)
            low, high = bootstrap_interval(gain, rng=np.random.default_rng(0))
            found[f"{OURS} {ours} less {arm} {size}"] = {"mean": float(gain.mean()), "ci": [low, high]}
    return found
