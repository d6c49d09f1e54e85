"""The preference encoder: one person's p(z|x), applied in numpy (torch is not loaded to generate).

A Gaussian with the prior's variance and mean mu + A f(x); A = head_out @ head_in has low rank and is there only where
cross-validation earned it. `scale` is the factor the KL budget allowed (strength 1).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from edge_align.errors import CorruptArtefact, InputError
from edge_align.records import SteeringVectors


@dataclass(frozen=True)
class PreferenceEncoder:
    """mean (k,), head_in (r, p), head_out (k, r), all float32; r = 0 when the mean is a constant."""

    mean: np.ndarray
    head_in: np.ndarray
    head_out: np.ndarray
    scale: float

    @property
    def k(self) -> int:
        return int(self.mean.shape[0])

    @property
    def depends_on_prompt(self) -> bool:
        return bool(self.head_in.shape[0])

    def latent(self, head_inputs: np.ndarray | None = None) -> np.ndarray:
        """The scaled mean of p(z|x), (k,) float32; head_inputs (p,) are needed only by a prompt-dependent profile."""
        mean = self.mean
        if self.depends_on_prompt and head_inputs is not None:
            mean = mean + self.head_out @ (self.head_in @ head_inputs)
        return np.asarray(self.scale * mean, dtype=np.float32)

    def to_tensors(self) -> dict[str, np.ndarray]:
        """What a profile version stores; a constant encoder stores no head."""
        tensors = {"mean": self.mean, "scale": np.array([self.scale], dtype=np.float32)}
        if self.depends_on_prompt:
            tensors |= {"head_in": self.head_in, "head_out": self.head_out}
        return tensors

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, np.ndarray]) -> PreferenceEncoder:
        """Raises CorruptArtefact, listing every mismatch, when the arrays are no preference encoder."""
        wrong = [name for name in ("mean", "scale") if name not in tensors]
        wrong += [name for name in tensors if name not in ("mean", "scale", "head_in", "head_out")]
        if ("head_in" in tensors) != ("head_out" in tensors):
            wrong.append("half a head")
        if not wrong:
            k = tensors["mean"].shape
            if len(k) != 1:
                wrong.append("mean is not a vector")
            if tensors["scale"].shape != (1,):
                wrong.append("scale is not one number")
            if "head_in" in tensors:
                into, out = tensors["head_in"], tensors["head_out"]
                if into.ndim != 2 or out.ndim != 2 or out.shape != (k[0], into.shape[0]):
                    wrong.append("head shapes do not fit")
            if not all(array.dtype == np.float32 for array in tensors.values()):
                wrong.append("not float32")
        if wrong:
            raise CorruptArtefact(f"the profile is no preference encoder: {', '.join(wrong)}")
        k_size = tensors["mean"].shape[0]
        return cls(
            mean=tensors["mean"],
            head_in=tensors.get("head_in", np.zeros((0, 0), np.float32)),
            head_out=tensors.get("head_out", np.zeros((k_size, 0), np.float32)),
            scale=float(tensors["scale"][0]),
        )


def profile_vectors(tensors: Mapping[str, np.ndarray]) -> SteeringVectors:
    """The scaled steering vectors of a profile that holds vectors in place of a latent (form "vectors").

    Raises CorruptArtefact.
    """
    shapes = {name: (array.dtype.name, array.ndim) for name, array in tensors.items()}
    if shapes != {"vectors": ("float32", 2), "scale": ("float32", 1)} or tensors["scale"].shape != (1,):
        raise CorruptArtefact(f"the profile holds no steering vectors, but {', '.join(sorted(tensors)) or 'nothing'}")
    try:
        return SteeringVectors(tensors["vectors"]).scaled(float(tensors["scale"][0]))
    except InputError as error:
        raise CorruptArtefact(f"the profile is damaged: {error}") from None
