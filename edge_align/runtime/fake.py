"""A backend with no engine and no model file, for tests: a language of bytes under a fixed random linear rule.

Logits are a function of the last two tokens plus a fixed projection of the steering vectors, so everything a real
backend promises holds here too and can be tested in milliseconds: zero vectors are the base, a seed fixes an answer,
steering changes it. Token ids 0-255 are bytes; 256 and 257 are the control tokens <|start|> and <|end|>.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from time import perf_counter

import numpy as np

from edge_align.config import RuntimeConfig, SamplingConfig
from edge_align.errors import ContextOverflow, InputError, SessionClosed
from edge_align.records import (
    Completion,
    FinishReason,
    GenerationChunk,
    GenerationStats,
    join_chunks,
    Prompt,
    SteeringVectors,
    TokenLogprob,
    Tools,
)
from edge_align.runtime.base import BackendInfo
from edge_align.runtime.sampling import draw
from edge_align.runtime.stream_text import TextStream
from edge_align.runtime.template import NO_TOOLS

N_VOCAB, START, END = 258, 256, 257
_CONTROL = {"<|start|>": START, "<|end|>": END}
_LETTERS = [*b" abcdefghijklmnopqrstuvwxyz.,"]


class FakeBackend:
    """`edge_align.runtime.base.Backend` without an engine."""

    def __init__(self, *, n_layer: int = 4, d_model: int = 16, config: RuntimeConfig | None = None) -> None:
        config = config or RuntimeConfig()
        self.info = BackendInfo(
            name="fake",
            version="1",
            architecture="fake",
            n_layer=n_layer,
            d_model=d_model,
            n_vocab=N_VOCAB,
            n_ctx=config.n_ctx,
            device="cpu",
            features=frozenset({"logit_bias", "logprobs"}),
        )
        self._config = config
        self._held = np.empty(0, np.int32)
        rng = np.random.default_rng(0)
        self._table = rng.normal(size=(2, N_VOCAB, N_VOCAB))  # logits after the last token, and after the one before
        self._table[0, :, _LETTERS] += 6.0  # mostly readable
        self._table[0, :, END] += 3.5
        self._table[:, :, START] = -100.0
        self._projection = rng.normal(size=(N_VOCAB, n_layer * d_model)) / np.sqrt(n_layer * d_model)
        self._projection[START] = 0.0
        self._closed = False

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        self._check_open()
        try:
            if not special:
                return [*text.encode()]
            head = min((text.find(name) for name in _CONTROL if name in text), default=-1)
            if head < 0:
                return [*text.encode()]
        except UnicodeEncodeError:
            raise InputError("the text holds a lone surrogate") from None
        name = next(name for name in _CONTROL if text.startswith(name, head))
        rest = self.tokenize(text[head + len(name) :], special=True)
        return [*self.tokenize(text[:head]), _CONTROL[name], *rest]

    def detokenize(self, tokens: Sequence[int]) -> str:
        self._check_open()
        return bytes(t for t in self._check_tokens(tokens) if t < 256).decode("utf-8", "replace")

    @property
    def takes_tools(self) -> bool:
        return False

    def render(self, prompt: Prompt, *, tools: Tools = ()) -> list[int]:
        self._check_open()
        if tools or any(message.role == "tool" for message in prompt):
            raise InputError(NO_TOOLS)
        turns = [[START, *self.tokenize(f"{m.role}\n{m.content}"), END] for m in prompt]
        return [*(token for turn in turns for token in turn), START, *self.tokenize("assistant\n")]

    def generate(
        self,
        prompt: Sequence[int],
        *,
        vectors: SteeringVectors | None,
        sampling: SamplingConfig,
        cancelled: Callable[[], bool] | None = None,
    ) -> Iterator[GenerationChunk]:
        tokens = self._check_prompt(prompt)
        return self._generate(tokens, self._steering(vectors), sampling, cancelled)

    def _generate(
        self, prompt: list[int], steering: np.ndarray, sampling: SamplingConfig, cancelled: Callable[[], bool] | None
    ) -> Iterator[GenerationChunk]:
        started = first = last = perf_counter()
        rng, stream = np.random.default_rng(sampling.seed), TextStream(sampling.stop)
        context, pending, text, count = [*prompt], [], "", 0
        limit = min(sampling.max_tokens, self.info.n_ctx - len(prompt) + 1)
        finish: FinishReason = "cancelled"
        top, logprobs = sampling.top_logprobs, []
        wanted = np.array(prompt[:-1], np.int32)
        same = self._held[: len(wanted)] == wanted[: len(self._held)]
        cached = int(np.argmin([*same, False]))
        self._held = wanted
        bias = np.zeros(N_VOCAB)
        for biased, amount in sampling.logit_bias:
            bias[biased % N_VOCAB] += amount
        while not (cancelled is not None and cancelled()):
            self._check_open()
            logits = self._logits(context) + steering
            token = draw(logits + bias, sampling, rng)
            last = perf_counter()
            first = first if count else last
            if token == END:
                finish = "stop"
                break
            count += 1
            context.append(token)
            pending.append(token)
            if top is not None:
                logprobs.append(_logprob(logits, token, top))
            text = stream.feed(bytes([token]))
            if stream.stopped or count >= limit:
                finish = "stop" if stream.stopped else "length"
                break
            if text:
                yield GenerationChunk(text, tuple(pending), logprobs=tuple(logprobs))
                text, pending, logprobs = "", [], []
        stats = GenerationStats(
            prompt_tokens=len(prompt),
            cached_tokens=cached,
            completion_tokens=count,
            ttft_sec=first - started,
            generation_sec=last - first,
            prompt_tps=0.0,
            generation_tps=(count - 1) / (last - first) if count > 1 and last > first else 0.0,
        )
        yield GenerationChunk(text + stream.finish(), tuple(pending), finish, stats, tuple(logprobs))

    def generate_batch(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        vectors: SteeringVectors | None,
        sampling: SamplingConfig,
        on_done: Callable[[int], None] | None = None,
    ) -> list[Completion]:
        answers = []
        steering, checked = self._steering(vectors), [self._check_prompt(prompt) for prompt in prompts]
        for i, prompt in enumerate(checked):
            own = SamplingConfig(
                temperature=sampling.temperature,
                top_k=sampling.top_k,
                top_p=sampling.top_p,
                max_tokens=sampling.max_tokens,
                seed=(sampling.seed + i) % 2**32,
                stop=sampling.stop,
            )
            answers.append(join_chunks(list(self._generate(prompt, steering, own, None))))
            if on_done is not None:
                on_done(i + 1)
        return answers

    def score(
        self, prompt: Sequence[int], completions: Sequence[Sequence[int]], *, vectors: SteeringVectors | None
    ) -> list[np.ndarray]:
        head, steering = self._check_prompt(prompt), self._steering(vectors)
        scores = []
        for completion in map(self._check_tokens, completions):
            rows = [self._logits([*head, *completion[:t]]) + steering for t in range(len(completion))]
            scores.append(np.array(rows, np.float32).reshape(-1, N_VOCAB))
        return scores

    def fork(self) -> FakeBackend:
        """Another one like it, with a prompt cache of its own."""
        self._check_open()
        return FakeBackend(n_layer=self.info.n_layer, d_model=self.info.d_model, config=self._config)

    @property
    def held(self) -> np.ndarray:
        return self._held

    def save_prompt(self) -> bytes:
        return self._held.tobytes()

    def load_prompt(self, tokens: np.ndarray, data: bytes) -> bool:
        self._held = np.frombuffer(data, np.int32)
        return np.array_equal(self._held, tokens)

    def forget_prompt(self) -> None:
        self._held = self._held[:0]

    def close(self) -> None:
        self._closed = True

    def __enter__(self) -> FakeBackend:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _logits(self, context: list[int]) -> np.ndarray:
        logits: np.ndarray = self._table[0, context[-1]] + self._table[1, context[-2] if len(context) > 1 else START]
        return logits

    def _steering(self, vectors: SteeringVectors | None) -> np.ndarray:
        if vectors is None:
            return np.zeros(N_VOCAB)
        expected = (self.info.n_layer, self.info.d_model)
        if vectors.array.shape != expected:
            raise InputError(f"the steering vectors have shape {vectors.array.shape}; this base has {expected}")
        steering: np.ndarray = self._projection @ vectors.array.ravel().astype(np.float64)
        return steering

    def _check_open(self) -> None:
        if self._closed:
            raise SessionClosed("this backend is closed; open it again")

    def _check_tokens(self, tokens: Sequence[int]) -> list[int]:
        if any(not 0 <= token < N_VOCAB for token in tokens):
            raise InputError(f"a token id lies outside the vocabulary of {N_VOCAB}")
        return [int(token) for token in tokens]

    def _check_prompt(self, prompt: Sequence[int]) -> list[int]:
        self._check_open()
        tokens, n_ctx = self._check_tokens(prompt), self.info.n_ctx
        if not tokens:
            raise InputError("the prompt is empty")
        if len(tokens) > n_ctx:
            raise ContextOverflow(f"the prompt is {len(tokens)} tokens long and the context holds {n_ctx}; shorten it")
        return tokens


def _logprob(logits: np.ndarray, token: int, top: int) -> TokenLogprob:
    """Log-softmax, spelt out."""
    logp = logits - np.log(np.exp(logits).sum())
    best = np.argsort(-logits, kind="stable")[:top]
    return TokenLogprob(token, float(logp[token]), tuple((int(i), float(logp[i])) for i in best))
