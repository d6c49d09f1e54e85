"""The seam between edge-align and an inference engine.

Contract of every backend:

* Layers are 0-based decoder blocks; row l of the steering vectors is added to the output of block l.
* The prompt up to its last token is prefilled unsteered; the last prompt token and every decoded position are
  steered. An answer depends on (prompt, vectors, sampling) alone: nothing steered stays in a cache.
* `vectors=None` and all-zero vectors give the base, token for token.
* Foreign exceptions never cross this border: they become members of `edge_align.errors`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable, TYPE_CHECKING

from edge_align.config import SamplingConfig
from edge_align.errors import BackendUnavailable
from edge_align.records import Completion, GenerationChunk, Prompt, SteeringVectors, Tools

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, slots=True)
class BackendInfo:
    """What an open engine is and can do."""

    name: str  # "llamacpp", "torch", "fake"
    version: str
    architecture: str  # general.architecture of the GGUF
    n_layer: int
    d_model: int
    n_vocab: int
    n_ctx: int
    device: str  # "cpu", or the accelerator's name
    per_row_steering: bool = False  # may rows of one batch carry different vectors?
    features: frozenset[str] = frozenset()  # of `SamplingConfig.needs`: what `generate` can do


class Backend(Protocol):
    """An open base model. One owner, one thread at a time; `close()` is idempotent."""

    @property
    def info(self) -> BackendInfo: ...

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of `text`, no BOS added; `special` parses control tokens such as <|im_end|>."""
        ...

    def detokenize(self, tokens: Sequence[int]) -> str:
        """Text of `tokens`, control tokens left out."""
        ...

    @property
    def takes_tools(self) -> bool:
        """Does the model's chat template read tools?"""
        ...

    def render(self, prompt: Prompt, *, tools: Tools = ()) -> list[int]:
        """Token ids of a conversation under the model's chat template, up to where the answer begins.

        Raises InputError for tools, or a turn of one, where the template has none.
        """
        ...

    def generate(
        self,
        prompt: Sequence[int],
        *,
        vectors: SteeringVectors | None,
        sampling: SamplingConfig,
        cancelled: Callable[[], bool] | None = None,
    ) -> Iterator[GenerationChunk]:
        """Stream an answer to `prompt` (token ids). Raises ContextOverflow, BackendError, SessionClosed.

        Chunks without tokens may come too: a part of a long prompt was read, or, of an engine that decodes several
        answers in one batch (`RuntimeConfig.n_rows`), the others may ask for their next token now.
        """
        ...

    def generate_batch(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        vectors: SteeringVectors | None,
        sampling: SamplingConfig,
        on_done: Callable[[int], None] | None = None,
    ) -> list[Completion]:
        """One sampled answer per prompt under the same vectors; row i uses seed `sampling.seed + i`.

        Faster than `generate` one by one; `on_done(n)` is told how many rows are finished.
        """
        ...

    def score(
        self,
        prompt: Sequence[int],
        completions: Sequence[Sequence[int]],
        *,
        vectors: SteeringVectors | None,
    ) -> list[np.ndarray]:
        """Teacher-forced logits: for each completion (T_i tokens) an array (T_i, n_vocab) float32, row t being
        the logits that predict completion[t]. Steered from the last prompt token on, as in decoding."""
        ...

    def close(self) -> None: ...


class ScoresMany(Protocol):
    """What scores texts of different prompts."""

    def score_many(
        self,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        *,
        vectors: SteeringVectors | None,
    ) -> Iterable[np.ndarray]:
        """`score` of completion i after prompt i, one (T_i, n_vocab) float32 array at a time."""
        ...


class Scoring(Backend, ScoresMany, Protocol):
    """An engine that decodes and scores."""


@runtime_checkable
class Forking(Protocol):
    """An engine that can hold several unfinished answers: each fork has a context of its own on the same weights.

    A fork keeps the keys and values of its last prompt (unsteered, so of no profile); they can be taken out and put
    into another fork of the same engine.
    """

    def fork(self) -> Backend:
        """Another context. Closing it leaves the weights; closing the engine closes it. Raises ModelLoadError."""
        ...

    @property
    def held(self) -> np.ndarray:
        """The prompt tokens whose keys and values are cached, (n,) int32."""
        ...

    def save_prompt(self) -> bytes:
        """The cached keys and values of `held`."""
        ...

    def load_prompt(self, tokens: np.ndarray, data: bytes) -> bool:
        """Cache what `save_prompt` gave for `tokens`; False, and an empty cache, when the engine refuses it."""
        ...

    def forget_prompt(self) -> None:
        """Empty the cache."""
        ...


def check_sampling(info: BackendInfo, sampling: SamplingConfig) -> None:
    """Raise BackendUnavailable when the engine cannot sample like this."""
    missing = sampling.needs - info.features
    if missing:
        raise BackendUnavailable(f"the engine {info.name} has no {', '.join(sorted(missing))}; leave it out")
