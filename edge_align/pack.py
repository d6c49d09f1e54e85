"""The latent pack: what all users of one base share.

Encoder side: `readout` maps pooled hidden states of an answer to k latents, uncorrelated over answers of the base to
one prompt and of mean variance 1. Decoder side: `decoder` maps latents linearly, with no offset, to steering vectors.
`metric` and `kl_curve` predict what a latent costs in KL from the base.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edge_align.errors import CorruptArtefact, IncompatibleBase, UnsupportedVersion
from edge_align.files import canonical_json, load_json_object, sha256_bytes, shown, write_atomic
from edge_align.records import SteeringVectors
from edge_align.tensors import dump_tensors, load_tensors

SCHEMA = 1
MANIFEST = "manifest.json"
TENSORS = "pack.safetensors"


@dataclass(frozen=True)
class BaseSample:
    """The base's own short answers to the first prompts of the set `pack`, which steered ones are held against.

    answers: token ids; nll: their mean NLL under the base, nats per token; collision: see `fluency.collision`.
    """

    answers: tuple[tuple[int, ...], ...]
    nll: float
    collision: float


@dataclass(frozen=True)
class LatentPack:
    """A loaded pack; arrays are float32 and read-only.

    readout (n_feature, k), feature_mean (n_feature,): z = (f - feature_mean) @ readout for answer features f.
    baseline (n_prompt_feature + 1, k): the mean latent of the base's answers to a prompt, linear in its features.
    prompt_projection (n_prompt_feature + 1, p): prompt features -> the p whitened inputs of the prompt head.
    variance (k,): posterior variance of a latent given an answer. decoder (k, n_layer, d_model); layer 0 is zero.
    metric (k, k): KL(base || steered by z) ~ z' metric z / 2 for small z, nats per token.
    kl_curve (3,): ln KL = c0 + c1 ln q + c2 (ln q)^2 with q = z' metric z / 2.
    """

    manifest: Mapping[str, Any]
    readout: np.ndarray
    feature_mean: np.ndarray
    baseline: np.ndarray
    prompt_projection: np.ndarray
    variance: np.ndarray
    decoder: np.ndarray
    metric: np.ndarray
    kl_curve: np.ndarray
    hash: str

    @property
    def k(self) -> int:
        return int(self.readout.shape[1])

    @property
    def base_hash(self) -> str:
        return str(self.manifest["base_hash"])

    @property
    def base_sample(self) -> BaseSample | None:
        """`fluency.sample_base` as it was when the pack was made; None where it was not kept, or is not readable."""
        try:
            answers = tuple(tuple(int(token) for token in answer) for answer in self.manifest["base_answers"])
            health = self.manifest["health"]
            found = BaseSample(answers, float(health["base_nll"]), float(health["base_collision"]))
        except (KeyError, TypeError, ValueError, OverflowError):
            return None
        return found if all(answers) and found.nll > 0.0 and found.collision > 0.0 else None

    @property
    def n_layer(self) -> int:
        return int(self.decoder.shape[1])

    @property
    def d_model(self) -> int:
        return int(self.decoder.shape[2])

    def encode(self, answer_features: np.ndarray) -> np.ndarray:
        """(n, n_feature) -> posterior means (n, k), not centred by prompt."""
        return np.asarray((answer_features - self.feature_mean) @ self.readout, dtype=np.float32)

    def expected(self, prompt_features: np.ndarray) -> np.ndarray:
        """(n, n_prompt_feature) -> mean latent of the base's own answers to these prompts, (n, k)."""
        return np.asarray(with_one(prompt_features) @ self.baseline, dtype=np.float32)

    def head_inputs(self, prompt_features: np.ndarray) -> np.ndarray:
        """(n, n_prompt_feature) -> (n, p) inputs of the prompt-dependent head."""
        return np.asarray(with_one(prompt_features) @ self.prompt_projection, dtype=np.float32)

    def decode(self, z: np.ndarray) -> SteeringVectors:
        """Latent (k,) -> steering vectors (n_layer, d_model). Linear, no offset (contract 3)."""
        return SteeringVectors(np.tensordot(np.asarray(z, dtype=np.float32), self.decoder, axes=1))

    def quadratic(self, z: np.ndarray) -> float:
        """z' metric z / 2."""
        return float(0.5 * z @ self.metric @ z)

    def predicted_kl(self, z: np.ndarray) -> float:
        """Predicted KL(base || steered by z), nats per decoded token."""
        q = self.quadratic(z)
        if q <= 0.0:
            return 0.0
        return kl_of_quadratic(q, self.kl_curve)

    def mean_kl(self, latents: np.ndarray) -> float:
        """Mean of `predicted_kl` over rows (n, k)."""
        return float(np.mean([self.predicted_kl(z) for z in latents]))

    def scale_for(self, latents: np.ndarray, kl: float) -> float:
        """The factor s with mean_kl(s * latents) = kl, by bisection; 0 when all latents or `kl` are zero."""
        if kl <= 0.0 or not latents.any():
            return 0.0
        low, high = math.log(1e-6), math.log(1e6)
        for _ in range(60):
            middle = (low + high) / 2
            if self.mean_kl(latents * math.exp(middle)) < kl:
                low = middle
            else:
                high = middle
        return math.exp((low + high) / 2)


def with_one(features: np.ndarray) -> np.ndarray:
    """Append a constant column: (n, p) -> (n, p + 1)."""
    return np.concatenate([features, np.ones((len(features), 1), dtype=features.dtype)], axis=1)


def kl_of_quadratic(q: float, curve: np.ndarray) -> float:
    """KL in nats per token predicted from the quadratic form; where the parabola flattens, a straight line goes on."""
    c0, c1, c2 = (float(c) for c in curve)
    x = math.log(q)
    if c2 != 0.0:
        edge = -0.375 * c1 / c2  # where the slope has sunk to a quarter of c1: beyond, the parabola would soon fall
        if (x - edge) * c2 < 0.0:
            return math.exp(c0 + c1 * edge + c2 * edge * edge + 0.25 * c1 * (x - edge))
    return math.exp(c0 + c1 * x + c2 * x * x)


def fit_kl_curve(quadratic: np.ndarray, measured: np.ndarray) -> np.ndarray:
    """Least squares of ln KL on (1, ln q, (ln q)^2) over measured directions and radii; (3,) float32."""
    x, y = np.log(quadratic), np.log(measured)
    coefficients = np.linalg.lstsq(np.stack([np.ones_like(x), x, x * x], 1), y, rcond=None)[0]
    return np.asarray(coefficients, dtype=np.float32)


def save_pack(
    folder: Path, *, tensors: Mapping[str, np.ndarray], manifest: Mapping[str, Any], card: str | None = None
) -> None:
    """Write a pack: tensors first, the manifest last, so that its presence means complete. The decoder is kept in fp16.

    The manifest gets schema, shapes and the tensors' checksum here.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kept = {
        name: np.ascontiguousarray(
            array, dtype=np.float16 if name in ("decoder", "readout", "baseline") else np.float32
        )
        for name, array in tensors.items()
    }
    data = dump_tensors(kept)
    write_atomic(folder / TENSORS, data)
    if card is not None:
        write_atomic(folder / "README.md", card.encode())
    body = {
        **manifest,
        "schema": SCHEMA,
        "kind": "latent-pack",
        "shapes": {name: list(array.shape) for name, array in kept.items()},
        "tensors_sha256": sha256_bytes(data),
    }
    write_atomic(folder / MANIFEST, canonical_json(body) + b"\n")


def load_pack(folder: Path, *, base_hash: str | None = None) -> LatentPack:
    """Read and check a pack; every mismatch is listed at once.

    Raises CorruptArtefact, UnsupportedVersion, or IncompatibleBase when `base_hash` is another base's.
    """
    if not (folder / MANIFEST).is_file():
        raise CorruptArtefact(
            f"{shown(folder)} holds no latent pack: {MANIFEST} is missing; edge-align export pack makes one"
        )
    manifest = load_json_object(folder / MANIFEST)
    if manifest.get("kind") != "latent-pack" or not isinstance(manifest.get("schema"), int):
        raise CorruptArtefact(f"{folder / MANIFEST} is not a latent pack's manifest")
    if manifest["schema"] > SCHEMA:
        raise UnsupportedVersion(
            f"the pack in {folder} has schema {manifest['schema']}; this edge-align reads up to {SCHEMA}"
        )
    if base_hash is not None and manifest.get("base_hash") != base_hash:
        raise IncompatibleBase(
            f"the pack in {folder} was made for base {str(manifest.get('base_hash'))[:23]}…, not {base_hash[:23]}…"
        )
    try:
        shapes = {name: tuple(int(n) for n in shape) for name, shape in manifest["shapes"].items()}
        f, k = shapes["readout"]
        layers, width = int(manifest["n_layer"]), int(manifest["d_model"])
        p1, inputs = shapes["prompt_projection"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptArtefact(f"{folder / MANIFEST} lacks shapes of the pack: {error!r}") from None
    expected = {
        "readout": ("float16", (f, k)),
        "feature_mean": ("float32", (f,)),
        "baseline": ("float16", (p1, k)),
        "prompt_projection": ("float32", (p1, inputs)),
        "variance": ("float32", (k,)),
        "decoder": ("float16", (k, layers, width)),
        "metric": ("float32", (k, k)),
        "kl_curve": ("float32", (3,)),
    }
    tensors = {name: array.astype(np.float32) for name, array in load_tensors(folder / TENSORS, expected).items()}
    digest = sha256_bytes((folder / TENSORS).read_bytes())
    if digest != manifest.get("tensors_sha256"):
        raise CorruptArtefact(f"{folder / TENSORS} is not the file its manifest describes; install the pack again")
    if tensors["decoder"][:, 0].any():
        raise CorruptArtefact(f"{folder / TENSORS} steers block 0, which no engine can")
    for array in tensors.values():
        array.setflags(write=False)
    return LatentPack(manifest=manifest, hash=digest, **tensors)
