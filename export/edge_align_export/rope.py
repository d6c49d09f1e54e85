"""Rotary settings of a Hugging Face `config.json`, as transformers 4 writes them and as transformers 5 does.

transformers 4: `rope_theta`, `rope_scaling`, and Gemma 3's `rope_local_base_freq`. transformers 5: `rope_parameters`
with all of it, or one such object for each type of layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from edge_align.errors import InputError

SCALINGS = ("default", "linear", "llama3")
BASE = 10000.0
FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True, slots=True)
class Rope:
    """scaling: one of SCALINGS, or another, which has no divisors here."""

    base: float
    scaling: str
    parameters: Mapping[str, Any]

    def frequencies(self, d_head: int) -> np.ndarray:
        """Radians per position, (d_head / 2,) float64. Raises InputError."""
        return np.asarray(rotary_frequencies(self.base, d_head) / self.divisors(d_head))

    def divisors(self, d_head: int) -> np.ndarray:
        """What the scaling divides frequencies by, (d_head / 2,) float64; Llama 3's slows the slow ones down and
        leaves the fast ones alone. Raises InputError."""
        if self.scaling == "default":
            return np.ones(d_head // 2)
        factor = self.number("factor")
        if self.scaling == "linear":
            return np.full(d_head // 2, factor)
        if self.scaling != "llama3":
            raise InputError(f"config.json has rope scaling {ascii(self.scaling)[:40]}, which is not known here")
        low, high = self.number("low_freq_factor"), self.number("high_freq_factor")
        if low == high:
            raise InputError("config.json has the same low_freq_factor and high_freq_factor")
        turns = self.number("original_max_position_embeddings") * rotary_frequencies(self.base, d_head) / (2 * math.pi)
        kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
        return np.asarray(1.0 / (kept + (1.0 - kept) / factor))

    def number(self, name: str) -> float:
        return _positive(self.parameters.get(name), name)


def rope_of(config: Mapping[str, Any], layers: str = FULL, *, usual: float = BASE) -> Rope:
    """Settings for layers of one type; sliding ones have neither the scaling nor the base of the others.

    usual: the base where none is given. Raises InputError for what is no setting, and for a rotary part of a head.
    """
    parameters, scaling = config.get("rope_parameters") or {}, config.get("rope_scaling") or {}
    if isinstance(parameters, dict) and not parameters.keys().isdisjoint((FULL, SLIDING)):
        parameters = parameters.get(layers) or {}
    elif layers == SLIDING:
        parameters = {}
    if not isinstance(parameters, dict) or not isinstance(scaling, dict):
        raise InputError("config.json: the rope settings are no object")
    if layers == SLIDING:
        given = {"rope_theta": config.get("rope_local_base_freq")} | parameters
    else:
        given = {"rope_theta": config.get("rope_theta")} | parameters | scaling
    part = given.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if part not in (None, 1):
        raise InputError(f"config.json has partial_rotary_factor {ascii(part)[:40]}, which is not known here")
    base = given["rope_theta"]
    kind = given.get("rope_type") or given.get("type") or "default"
    return Rope(usual if base is None else _positive(base, "rope_theta"), str(kind), given)


def rotary_frequencies(base: float, d_head: int) -> np.ndarray:
    """(d_head / 2,) float64: radians per position (arXiv 2104.09864), unscaled."""
    half = d_head // 2
    return np.asarray(base ** (-np.arange(half, dtype=np.float64) / half))


def _positive(value: object, name: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise InputError(f"config.json has no usable {name}: {ascii(value)[:40]}")
    return float(value)
