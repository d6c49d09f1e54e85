"""A pack of a few numbers."""

import numpy as np

BASE_HASH = "sha256:" + "a" * 64
K, F, P, INPUTS, LAYERS, WIDTH = 3, 5, 4, 2, 4, 6


def tensors(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(K, K))
    decoder = rng.normal(size=(K, LAYERS, WIDTH))
    decoder[:, 0] = 0
    return {
        "readout": rng.normal(size=(F, K)).astype(np.float16),
        "feature_mean": rng.normal(size=F).astype(np.float32),
        "baseline": rng.normal(size=(P + 1, K)).astype(np.float16),
        "prompt_projection": rng.normal(size=(P + 1, INPUTS)).astype(np.float32),
        "variance": np.full(K, 0.3, np.float32),
        "decoder": decoder.astype(np.float16),
        "metric": (root @ root.T).astype(np.float32),
        "kl_curve": np.array([-0.1, 0.95, -0.03], np.float32),
    }


def manifest() -> dict[str, object]:
    return {"base_hash": BASE_HASH, "n_layer": LAYERS, "d_model": WIDTH, "k": K}
