"""Every default and every range, once. CLI options take theirs from these fields."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from edge_align.errors import InputError


def bounded(value: float | int, low: float, high: float, name: str) -> None:
    """Raise InputError unless low <= value <= high (NaN never is)."""
    if not (low <= value <= high) or (isinstance(value, float) and math.isnan(value)):
        raise InputError(f"{name} is {value}; it must lie between {low:g} and {high:g}")


def default(config: type[Any], name: str) -> Any:
    """The default of one field of a config class, for a CLI option's `default=`."""
    return next(f.default for f in fields(config) if f.name == name)


@dataclass(frozen=True, slots=True)
class SamplingConfig:
    """How the next token is drawn: top-k, then top-p, then temperature. Temperature 0 is greedy."""

    temperature: float = 1.0
    top_k: int = 100  # first, because top-p over a whole vocabulary costs milliseconds a token
    top_p: float = 0.95
    max_tokens: int = 256
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        bounded(self.temperature, 0.0, 10.0, "temperature")
        bounded(self.top_k, 1, 1_000_000, "top-k")
        bounded(self.top_p, 0.0, 1.0, "top-p")
        bounded(self.max_tokens, 1, 1_000_000, "max-tokens")
        bounded(self.seed, 0, 2**32 - 1, "seed")
        if len(self.stop) > 16 or any(not 0 < len(text) <= 256 for text in self.stop):
            raise InputError("at most 16 stop strings of 1 to 256 characters")


@dataclass(frozen=True, slots=True)
class RuntimeConfig:
    """How an engine is opened."""

    n_ctx: int = 2048  # tokens
    n_threads: int = 0  # 0: one per physical core the process may use
    n_gpu_layers: int = 0  # passed through to a GPU build

    def __post_init__(self) -> None:
        bounded(self.n_ctx, 64, 1_048_576, "n-ctx")
        bounded(self.n_threads, 0, 1024, "threads")
        bounded(self.n_gpu_layers, -1, 10_000, "n-gpu-layers")


@dataclass(frozen=True, slots=True)
class PersonalizeConfig:
    """kl_budget: most KL from the base, nats per decoded token; a ceiling that little evidence does not reach."""

    kl_budget: float = 0.4
    seed: int = 0
    activate: bool = True
    force: bool = False

    def __post_init__(self) -> None:
        bounded(self.kl_budget, 0.001, 2.0, "kl-budget")
        bounded(self.seed, 0, 2**32 - 1, "seed")


STRENGTH_LIMIT = 4.0
"""|strength| above this is refused: KL grows about with its square, so 4 is sixteen budgets."""


def check_strength(strength: float) -> None:
    """Raise InputError when `strength` is out of range."""
    bounded(strength, -STRENGTH_LIMIT, STRENGTH_LIMIT, "strength")
