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
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, added to its logit)
    grammar: str | None = None  # GBNF; the answer is one of its sentences, or the beginning of one
    top_logprobs: int | None = None  # None: no log-probabilities; else so many alternatives beside each token

    def __post_init__(self) -> None:
        bounded(self.temperature, 0.0, 10.0, "temperature")
        bounded(self.top_k, 1, 1_000_000, "top-k")
        bounded(self.top_p, 0.0, 1.0, "top-p")
        bounded(self.max_tokens, 1, 1_000_000, "max-tokens")
        bounded(self.seed, 0, 2**32 - 1, "seed")
        if len(self.stop) > 16 or any(not 0 < len(text) <= 256 for text in self.stop):
            raise InputError("at most 16 stop strings of 1 to 256 characters")
        bounded(self.presence_penalty, -2.0, 2.0, "presence-penalty")
        bounded(self.frequency_penalty, -2.0, 2.0, "frequency-penalty")
        if len(self.logit_bias) > 1024:
            raise InputError("at most 1024 tokens can have a bias")
        for token, bias in self.logit_bias:
            bounded(token, 0, 2**31 - 1, "the token id of a logit bias")
            bounded(bias, -100.0, 100.0, "logit bias")
        bounded(self.top_logprobs or 0, 0, 20, "top-logprobs")

    @property
    def needs(self) -> frozenset[str]:
        """What an engine must declare in `BackendInfo.features` to sample like this."""
        asked = {
            "penalties": self.presence_penalty or self.frequency_penalty,
            "logit_bias": self.logit_bias,
            "grammar": self.grammar is not None,
            "logprobs": self.top_logprobs is not None,
        }
        return frozenset(name for name, used in asked.items() if used)


@dataclass(frozen=True, slots=True)
class RuntimeConfig:
    """How an engine is opened."""

    n_ctx: int = 2048  # tokens
    n_threads: int = 0  # 0: one per physical core the process may use
    n_gpu_layers: int = 0  # passed through to a GPU build
    n_rows: int = 1  # answers that are decoded in one batch, where the engine steers every row on its own

    def __post_init__(self) -> None:
        bounded(self.n_ctx, 64, 1_048_576, "n-ctx")
        bounded(self.n_threads, 0, 1024, "threads")
        bounded(self.n_gpu_layers, -1, 10_000, "n-gpu-layers")
        bounded(self.n_rows, 1, 256, "n-rows")


@dataclass(frozen=True, slots=True)
class PersonalizeConfig:
    """kl_budget: most KL from the base, nats per decoded token; a ceiling that little evidence does not reach.

    nll_limit: most NLL of steered answers under the base, as a multiple of the base's own; 0: they are not tried.
    collision_limit: most collisions of the next token, as a multiple of the base's own; 0: not looked at.
    no_worse: do not activate a version that predicts verdicts new to both worse than the active one does, and switch
        the active one off when all verdicts can no longer be told from chance (gate.RETIRE_P).
    use: make the profile the one in use when a version is activated.
    """

    kl_budget: float = 0.25
    nll_limit: float = 1.3
    collision_limit: float = 1.2
    seed: int = 0
    activate: bool = True
    force: bool = False
    no_worse: bool = False
    use: bool = True

    def __post_init__(self) -> None:
        bounded(self.kl_budget, 0.001, 2.0, "kl-budget")
        for name in ("nll_limit", "collision_limit"):
            if getattr(self, name):
                bounded(getattr(self, name), 1.0, 100.0, name.replace("_", "-"))
        bounded(self.seed, 0, 2**32 - 1, "seed")


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """What `edge-align serve` allows. Sizes in bytes, times in seconds unless the name says otherwise."""

    host: str = "127.0.0.1"
    port: int = 8377
    profile: str | None = None  # answered with when a request names none
    learn: str = "auto"  # after every `learn_every` verdicts, "manual": when asked to, "off": never
    learn_every: int = 8
    slots: int = 4  # answers decoded in turns, each in a context of its own
    queue: int = 32  # answers that may wait for a slot
    slice_tokens: int = 16  # decoded for one answer before the next one's turn
    cache_mib: int = 256  # prompts kept beside the slots' own
    keep_days: int = 30  # answers are remembered for so long, so that feedback needs only their ids
    body_bytes: int = 4 << 20
    head_sec: float = 10.0  # for a request's headers to arrive, on a new connection or after the answer before
    body_sec: float = 30.0  # for a request's body to arrive
    read_sec: float = 30.0  # without a client's reading anything of its answer
    connections: int = 512
    wall_sec: float = 600.0  # for an answer, waiting included
    nesting: int = 32  # of JSON
    messages: int = 512
    max_tokens: int = 4096  # of one answer
    n: int = 8  # answers of one request
    schema_bytes: int = 16 << 10
    tools: int = 128  # functions offered with one request
    tools_bytes: int = 64 << 10
    inputs: int = 64  # texts of one request for embeddings
    origins: tuple[str, ...] = ()  # web pages that may call, beside those of this machine
    hosts: tuple[str, ...] = ()  # names under which the server may be reached, beside this machine's own

    def __post_init__(self) -> None:
        if self.learn not in ("auto", "manual", "off"):
            raise InputError(f"learn is {self.learn!r}; it must be auto, manual or off")
        bounded(self.port, 0, 65_535, "port")
        bounded(self.learn_every, 1, 100_000, "learn-every")
        bounded(self.slots, 1, 64, "slots")
        bounded(self.queue, 1, 10_000, "queue")
        bounded(self.slice_tokens, 1, 4096, "slice-tokens")
        bounded(self.cache_mib, 0, 1 << 20, "cache-mib")
        bounded(self.keep_days, 0, 36_500, "keep-days")
        bounded(self.wall_sec, 0.01, 86_400.0, "wall-sec")


STRENGTH_LIMIT = 4.0
"""|strength| above this is refused: KL grows about with its square, so 4 is sixteen budgets."""


def check_strength(strength: float) -> None:
    """Raise InputError when `strength` is out of range."""
    bounded(strength, -STRENGTH_LIMIT, STRENGTH_LIMIT, "strength")
