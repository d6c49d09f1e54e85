"""The values that flow through edge-align: frozen, checked when made, free of policy."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TYPE_CHECKING

from edge_align.errors import InputError

if TYPE_CHECKING:
    import numpy as np

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant")
"""Who speaks in feedback. A `tool` turn is what a function gave back, in the server alone."""

Tools = tuple[dict[str, Any], ...]
"""Functions that a model may call, each as {"type": "function", "function": {"name", "description", "parameters"}}."""

Origin = Literal["preference", "edit", "siblings", "retry", "compare", "opposed", "thumb"]
"""How a row came about. `siblings`: two answers of one chat export with opposite verdicts; `retry`: a rated
retry in `chat`; `compare`: picked in `compare`; `opposed`: a thumb up and a thumb down on the same prompt;
`thumb`: a lone verdict."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str

    def __post_init__(self) -> None:
        if self.role not in (*ROLES, "tool"):
            raise InputError(f"unknown role {self.role!r}; roles are {', '.join(ROLES)}")


Prompt = tuple[Message, ...]
"""A conversation that ends where the answer begins."""


def user_prompt(text: str, *, system: str | None = None) -> Prompt:
    """A one-question prompt."""
    head = (Message("system", system),) if system is not None else ()
    return (*head, Message("user", text))


@dataclass(frozen=True, slots=True)
class FeedbackRow:
    """One verdict as it is kept in the feedback log.

    Either a pair (`chosen` and `rejected` set) or an unpaired verdict (`completion` and `label` set).
    Every text is non-empty after stripping, holds no NUL and no lone surrogate; `chosen != rejected`.

    Raises InputError, saying what is wrong, when the fields do not make a row.
    """

    prompt: Prompt
    chosen: str | None = None
    rejected: str | None = None
    completion: str | None = None
    label: bool | None = None
    origin: Origin = "preference"
    weight: float = 1.0
    reason: str | None = None
    tags: tuple[str, ...] = ()
    ts: str | None = None  # ISO 8601, as the source gave it
    model: str | None = None  # which model wrote the answers, as the source gave it
    id: str | None = None  # the source's own id of this verdict
    source: str = "native"  # the reader's name

    def __post_init__(self) -> None:
        pair = self.chosen is not None and self.rejected is not None
        rating = self.completion is not None and self.label is not None
        if pair == rating:
            raise InputError("a row is either chosen + rejected or completion + label")
        if not self.prompt or self.prompt[-1].role == "assistant":
            raise InputError("the prompt is empty or does not end with a question")
        for name, text in self.texts():
            check_text(name, text)
        if pair and self.chosen == self.rejected:
            raise InputError("chosen and rejected are the same text")
        if not (0.0 < self.weight <= 100.0):  # also refuses NaN
            raise InputError(f"weight {self.weight!r} is not in (0, 100]")

    @property
    def is_pair(self) -> bool:
        return self.chosen is not None

    def texts(self) -> list[tuple[str, str]]:
        """(name, text) of every text in the row; prompt turns are named `prompt`."""
        found = [("prompt", message.content) for message in self.prompt]
        for name in ("chosen", "rejected", "completion"):
            value = getattr(self, name)
            if value is not None:
                found.append((name, value))
        return found

    def key(self) -> str:
        """Deduplication key: sha256 over what was said, when, and the source's id; not over its file format."""
        body = [
            [[m.role, m.content] for m in self.prompt],
            self.chosen,
            self.rejected,
            self.completion,
            self.label,
            self.ts,
            self.id,
        ]
        text = json.dumps(body, ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()  # `ts` and `id` are not checked texts


def check_text(name: str, text: str) -> None:
    """Raise InputError when `text` is empty or cannot be stored and tokenised as UTF-8."""
    if not text.strip():
        raise InputError(f"{name} is empty")
    if "\x00" in text:
        raise InputError(f"{name} holds a NUL character")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{name} holds a lone surrogate") from None


@dataclass(frozen=True, slots=True)
class DroppedRow:
    """A record that could not be used: where it stood and why."""

    file: str
    line: int  # 1-based line of a line format, 1-based index of an array format
    reason: str


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """What Latent DPO learns from: two answers to one prompt, the better one first."""

    prompt: Prompt
    chosen: str
    rejected: str
    origin: Origin = "preference"
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Rating:
    """A lone verdict (unpaired feedback)."""

    prompt: Prompt
    completion: str
    label: bool
    weight: float = 1.0


@dataclass(frozen=True)
class SteeringVectors:
    """What is added to the hidden states: row l goes to the output of decoder block l.

    array: (n_layer, d_model) float32, read-only. Row 0 is zero (llama.cpp cannot steer block 0).
    """

    array: np.ndarray = field(repr=False)

    def __post_init__(self) -> None:
        import numpy as np

        array = np.ascontiguousarray(self.array, dtype=np.float32)
        if array is self.array:
            array = array.copy()
        if array.ndim != 2:
            raise InputError(f"steering vectors have shape {array.shape}; expected (n_layer, d_model)")
        if not np.isfinite(array).all():
            raise InputError("steering vectors hold NaN or infinity")
        if array[0].any():
            raise InputError("steering vectors have a non-zero row 0; block 0 is never steered")
        array.setflags(write=False)
        object.__setattr__(self, "array", array)

    @property
    def n_layer(self) -> int:
        return int(self.array.shape[0])

    @property
    def d_model(self) -> int:
        return int(self.array.shape[1])

    @property
    def is_zero(self) -> bool:
        return not self.array.any()

    def scaled(self, factor: float) -> SteeringVectors:
        """These vectors times `factor`."""
        return SteeringVectors(self.array * factor)


FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """How likely a decoded token was, natural logarithm, before temperature; and the likeliest tokens in its place."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (token, logprob), the likeliest first


@dataclass(frozen=True, slots=True)
class GenerationChunk:
    """A piece of a streamed answer. The last chunk of an answer has `finish_reason` and `stats` set."""

    text: str  # whole UTF-8 characters only; may be empty
    tokens: tuple[int, ...] = ()  # decoded since the previous chunk, end-of-text excluded
    finish_reason: FinishReason | None = None
    stats: GenerationStats | None = None
    logprobs: tuple[TokenLogprob, ...] = ()  # one per token, where they were asked for


@dataclass(frozen=True, slots=True)
class GenerationStats:
    """Costs of one answer."""

    prompt_tokens: int
    cached_tokens: int  # of the prompt, taken from the prefix cache
    completion_tokens: int
    ttft_sec: float  # from the call to the first decoded token
    generation_sec: float  # from the first decoded token to the last
    prompt_tps: float  # prefilled (uncached) prompt tokens per second
    generation_tps: float  # decoded tokens per second after the first


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer."""

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    stats: GenerationStats | None = None


def join_chunks(chunks: Sequence[GenerationChunk]) -> Completion:
    """Fold streamed chunks into one answer."""
    last = chunks[-1]
    if last.finish_reason is None:
        raise ValueError("the stream has not ended")
    return Completion(
        text="".join(chunk.text for chunk in chunks),
        tokens=tuple(token for chunk in chunks for token in chunk.tokens),
        finish_reason=last.finish_reason,
        stats=last.stats,
    )
