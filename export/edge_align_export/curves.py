"""The losses of a training run, as numbers and as a picture, beside the pack."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from edge_align.files import replacing, write_json

LOSSES, PICTURE = "training.json", "training.png"
LABELS = {
    "reconstruction": "reconstruction, nats per token",
    "contrast": "contrast, nats per answer",
    "kl": "KL of the aggregated posterior, nats",
}


def save_curves(folder: Path, history: Sequence[dict[str, float]]) -> None:
    """Write `training.json`, and `training.png` where matplotlib is installed. Raises StorageError."""
    write_json(folder / LOSSES, {"history": [{name: round(x, 4) for name, x in step.items()} for step in history]})
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [name for name in LABELS if name in history[0]]
    figure, axes = pyplot.subplots(len(names), 1, figsize=(7, 2.2 * len(names)), sharex=True, squeeze=False)
    for axis, name in zip(axes[:, 0], names, strict=True):
        values = np.array([step[name] for step in history])
        axis.plot(values, linewidth=0.6, color="#9db4c0")
        axis.plot(smooth(values), linewidth=1.6, color="#253237")
        axis.set_ylabel(LABELS[name], fontsize=8)
    axes[-1, 0].set_xlabel("step")
    figure.tight_layout()
    with replacing(folder / PICTURE) as path:
        figure.savefig(path, format="png", dpi=110)
    pyplot.close(figure)


def smooth(values: np.ndarray, share: float = 0.05) -> np.ndarray:
    """Running mean over the last `share` of the steps, shorter at the start."""
    width = max(1, round(share * len(values)))
    total = np.cumsum(np.concatenate([[0.0], values]))
    first = np.maximum(np.arange(len(values)) - width + 1, 0)
    return np.asarray((total[1:] - total[first]) / (np.arange(len(values)) - first + 1))
