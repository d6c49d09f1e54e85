"""The llama.cpp engine: one context for streaming answers, another, on demand, for many rows at once.

What an answer may depend on is settled by one rule. A prompt is read in parts that end after a turn, or after
PREFILL_CHUNK tokens, and what is reused of an earlier prompt ends with such a part, unless the prompt is the very same.
Reuse up to any token is faster by a part of a part, but changes the parts, and with them the order of float operations:
on the default base logits then move by up to 0.9. With the rule they are equal to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, ExitStack
from functools import cached_property
from pathlib import Path
from time import perf_counter

import numpy as np

from edge_align.config import RuntimeConfig, SamplingConfig
from edge_align.errors import BackendError, BackendUnavailable, ContextOverflow, InputError, SessionClosed
from edge_align.records import (
    Completion,
    FinishReason,
    GenerationChunk,
    GenerationStats,
    Prompt,
    SteeringVectors,
    Tools,
)
from edge_align.runtime.base import Backend, BackendInfo
from edge_align.runtime.llama_checks import check_tokens, check_vectors, context_length, part_ends
from edge_align.runtime.llama_devices import device_of
from edge_align.runtime.llama_native import NativeContext, NativeModel
from edge_align.runtime.llama_rows import Rows
from edge_align.runtime.llama_sampler import Sampler
from edge_align.runtime.sampling import log_softmax_top
from edge_align.runtime.stream_text import TextStream
from edge_align.runtime.template import ChatTemplate, render_tokens
from edge_align.runtime.tokens import common_prefix, rate

PREFILL_CHUNK = 64  # tokens; larger ones are no faster on a CPU and need larger buffers
PREFILL_CHUNK_GPU = 512


class LlamaCppBackend:
    """`edge_align.runtime.base.Backend` on llama.cpp. Use `open`; close it, or use it as a context manager."""

    def __init__(self, model: NativeModel, context: NativeContext, config: RuntimeConfig, stack: ExitStack) -> None:
        self._model, self._context, self._config, self._stack = model, context, config, stack
        self._closed = False
        self._cached = np.empty(0, np.int32)  # tokens whose unsteered keys and values the context holds
        self._turn = 0  # number of the answer that owns the context
        self._rows: Rows | None = None
        self.info = BackendInfo(
            name="llamacpp",
            version=_version(),
            architecture=model.header.architecture,
            n_layer=model.n_layer,
            d_model=model.d_model,
            n_vocab=model.n_vocab,
            n_ctx=context.n_ctx,
            device=device_of(model),
            features=frozenset({"penalties", "logit_bias", "grammar", "logprobs"}),
        )

    @classmethod
    def open(cls, path: str | Path, *, config: RuntimeConfig | None = None) -> LlamaCppBackend:
        """Load a GGUF. The context is capped at what the model was trained on (`info.n_ctx` is in effect).

        Raises ModelLoadError, BackendUnavailable.
        """
        config = config or RuntimeConfig()
        with ExitStack() as stack:
            model = stack.enter_context(closing(NativeModel(Path(path), n_gpu_layers=config.n_gpu_layers)))
            context = stack.enter_context(closing(_context(model, config)))
            return cls(model, context, config, stack.pop_all())

    def fork(self) -> LlamaCppBackend:
        """Another context on the same weights (tens of MB); see `runtime.base.Forking`. Raises ModelLoadError."""
        self._check_open()
        with ExitStack() as stack:
            context = stack.enter_context(closing(_context(self._model, self._config)))
            forked = LlamaCppBackend(self._model, context, self._config, stack.pop_all())
        self._stack.callback(forked.close)  # before the weights go
        return forked

    def close(self) -> None:
        self._closed = True
        self._stack.close()

    def __enter__(self) -> LlamaCppBackend:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- text and tokens -------------------------------------------------------------------------------------------
    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of `text`, no BOS added. Raises InputError for text that is not UTF-8 or over 16 MiB."""
        self._check_open()
        return self._model.tokenize(text, special=special)

    def detokenize(self, tokens: Sequence[int]) -> str:
        """Text of `tokens`, control tokens left out, bytes that are not UTF-8 as U+FFFD."""
        self._check_open()
        ids = check_tokens(self._model, tokens, "token list")
        return b"".join(map(self._model.piece, ids.tolist())).decode("utf-8", "replace")

    def render(self, prompt: Prompt, *, tools: Tools = ()) -> list[int]:
        """Token ids of a conversation under the GGUF's chat template. Texts in messages never become control tokens."""
        self._check_open()
        model = self._model
        return render_tokens(
            self.template,
            prompt,
            tools,
            tokenize=model.tokenize,
            control=lambda: model.control_pattern,
            bos=model.bos if model.adds_bos else None,
        )

    @property
    def ends(self) -> tuple[int, ...]:
        """All tokens that end an answer, first the usual one."""
        self._check_open()
        return self._model.ends

    @property
    def takes_tools(self) -> bool:
        return self.template.takes_tools

    @cached_property
    def template(self) -> ChatTemplate:
        """The model's chat template. Raises ModelLoadError when it is broken."""
        self._check_open()
        model = self._model
        bos, eos = (
            "" if token is None else model.text_of(token).decode("utf-8", "replace") for token in (model.bos, model.eos)
        )
        return ChatTemplate(model.chat_template, bos_token=bos, eos_token=eos)

    # -- one answer ------------------------------------------------------------------------------------------------
    def generate(
        self,
        prompt: Sequence[int],
        *,
        vectors: SteeringVectors | None,
        sampling: SamplingConfig,
        cancelled: Callable[[], bool] | None = None,
    ) -> Iterator[GenerationChunk]:
        """Stream an answer. A new answer takes the context over: an unfinished one then raises BackendError.

        While a long prompt is read, an empty chunk comes now and then.

        Raises ContextOverflow, InputError at once; BackendError, SessionClosed while streaming.
        """
        self._check_open()
        return self._generate(self._check_prompt(prompt), check_vectors(self._model, vectors), sampling, cancelled)

    def _generate(
        self,
        prompt: np.ndarray,
        vectors: SteeringVectors | None,
        sampling: SamplingConfig,
        cancelled: Callable[[], bool] | None,
    ) -> Iterator[GenerationChunk]:
        started = perf_counter()
        self._check_open()
        self._turn += 1
        turn, context, n = self._turn, self._context, len(prompt)
        top, logprobs = sampling.top_logprobs, []
        stream = TextStream(sampling.stop)
        limit = min(sampling.max_tokens, context.n_ctx - n + 1)
        count, pending, text, cached = 0, [], "", 0
        prefilled = first = last = started
        finish: FinishReason = "cancelled"
        with closing(Sampler(self._model, sampling, sampling.seed)) as sampler:
            try:
                cached = yield from self._fill_cache(prompt[:-1], cancelled)
                prefilled = first = last = perf_counter()
                context.set_vectors(vectors)
                # the loop below runs once per token: everything it needs is a local
                decode, handle = context.decode, context.pointer
                sample, chain = context.C.llama_sampler_sample, sampler.chain
                piece, is_end, ids, positions = self._model.piece, self._model.is_end, context.token, context.pos
                context.seq[0], context.wanted[0] = 0, 1
                token, position = int(prompt[-1]), n - 1
                while len(self._cached) == n - 1 and not (cancelled is not None and cancelled()):
                    ids[0], positions[0] = token, position
                    decode(1)
                    token = sample(chain, handle, -1)
                    position += 1
                    last = perf_counter()
                    if not count:
                        first = last
                    if is_end(token):
                        finish = "stop"
                        break
                    count += 1
                    pending.append(token)
                    if top is not None:
                        logprobs.append(log_softmax_top(context.logits(1)[0], token, top))
                    text = stream.feed(piece(token))
                    if stream.stopped or count >= limit:
                        finish = "stop" if stream.stopped else "length"
                        break
                    if text:
                        yield GenerationChunk(text, tuple(pending), logprobs=tuple(logprobs))
                        self._check_turn(turn)
                        text, pending, logprobs = "", [], []
            finally:
                if self._turn == turn and not self._closed:
                    self._end_answer(n - 1)
        stats = GenerationStats(
            prompt_tokens=n,
            cached_tokens=cached,
            completion_tokens=count,
            ttft_sec=first - started,
            generation_sec=last - first,
            prompt_tps=rate(n - 1 - cached, prefilled - started),
            generation_tps=rate(count - 1, last - first),
        )
        yield GenerationChunk(text + stream.finish(), tuple(pending), finish, stats, tuple(logprobs))

    # -- the prompt cache ------------------------------------------------------------------------------------------
    @property
    def held(self) -> np.ndarray:
        """(n,) int32: the prompt tokens whose unsteered keys and values are cached."""
        return self._cached

    def save_prompt(self) -> bytes:
        """The keys and values of `held`, for `load_prompt` of a fork; about 23 kB a token for the default base."""
        self._check_open()
        self._context.forget(0, len(self._cached))
        return self._context.save(0)

    def load_prompt(self, tokens: np.ndarray, data: bytes) -> bool:
        """Take over what a fork saved; the same floats, bit for bit. False, and an empty cache, when refused."""
        self.forget_prompt()
        if self._context.load(0, data):
            self._cached = tokens
            return True
        self.forget_prompt()
        return False

    def forget_prompt(self) -> None:
        """Empty the cache; an unfinished answer then raises BackendError."""
        self._check_open()
        self._turn += 1
        self._cached = self._cached[:0]
        self._context.clear()

    def _fill_cache(
        self, tokens: np.ndarray, cancelled: Callable[[], bool] | None
    ) -> Generator[GenerationChunk, None, int]:
        """Make the context hold exactly `tokens`, unsteered; returns how many it held before.

        Before it has read more than n_batch tokens at a stretch it yields an empty chunk, so that whoever has other
        answers to give can do so meanwhile.
        """
        context, turn = self._context, self._turn
        keep, ends = common_prefix(self._cached, tokens), part_ends(tokens, self._model.is_turn_end, context.n_batch)
        if not keep == len(tokens) == len(self._cached):
            keep = max((end for end in ends[:-1] if end <= keep), default=0)
        if not context.forget(0, keep):  # also what an answer that was never ended has decoded
            keep = 0
        self._cached = self._cached[:keep]
        start = told = keep
        for end in (end for end in ends if end > keep):
            if end - told > context.n_batch:
                yield GenerationChunk("")
                self._check_turn(turn)
                told = start
            if cancelled is not None and cancelled():
                break
            try:
                context.set_vectors(None)
                context.decode_span(tokens[start:end], start)
            except BackendError:
                self._cached = self._cached[:0]
                context.clear()
                raise
            self._cached, start = tokens[:end], end
        return keep

    def _check_turn(self, turn: int) -> None:
        """After a yield: is the context still this answer's?"""
        if self._turn != turn or self._closed:
            self._check_open()
            raise BackendError("another answer was started before this one ended")

    def _end_answer(self, start: int) -> None:
        """Drop what was decoded from position `start` on, the steered part."""
        if len(self._cached) < start:  # cancelled in the middle of the prompt: nothing steered is there
            return
        if not self._context.forget(0, start):
            self._cached = self._cached[:0]

    # -- many rows -------------------------------------------------------------------------------------------------
    def generate_batch(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        vectors: SteeringVectors | None,
        sampling: SamplingConfig,
        on_done: Callable[[int], None] | None = None,
    ) -> list[Completion]:
        """One answer per prompt, up to 32 decoded together; row i uses seed `sampling.seed + i`.

        The same call gives the same answers. They may differ from `generate`'s in rare tokens: a batch adds floats in
        another order. Completions carry no stats. Raises ContextOverflow, InputError, BackendError, SessionClosed.
        """
        self._check_open()
        checked = [self._check_prompt(prompt) for prompt in prompts]
        return self._many().generate(checked, check_vectors(self._model, vectors), sampling, on_done)

    def score(
        self, prompt: Sequence[int], completions: Sequence[Sequence[int]], *, vectors: SteeringVectors | None
    ) -> list[np.ndarray]:
        """Teacher-forced logits, see the protocol. Memory: 4 * n_vocab bytes per completion token."""
        return list(self.score_many([prompt] * len(completions), completions, vectors=vectors))

    def score_many(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], *, vectors: SteeringVectors | None
    ) -> Iterator[np.ndarray]:
        """`score` of completion i after prompt i, one (T_i, n_vocab) float32 array at a time.

        Up to 32 prompts stay in the cache unsteered, so scoring them again under other vectors costs the completions
        alone. Raises InputError, ContextOverflow at once; BackendError, SessionClosed while iterating.
        """
        self._check_open()
        if len(prompts) != len(completions):
            raise InputError(f"{len(prompts)} prompts and {len(completions)} completions do not pair up")
        jobs = [
            (self._check_prompt(prompt), check_tokens(self._model, completion, "completion"))
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        for prompt_ids, completion_ids in jobs:
            self._check_fits(len(prompt_ids) + len(completion_ids) - 1, "prompt with its completion")
        return self._many().score(jobs, check_vectors(self._model, vectors))

    def _many(self) -> Rows:
        if self._rows is None:
            rows = Rows(self._model, n_ctx=self.info.n_ctx, n_threads=self._config.n_threads)
            self._rows = self._stack.enter_context(closing(rows))
        return self._rows

    # -- checks ----------------------------------------------------------------------------------------------------
    def _check_open(self) -> None:
        if self._closed:
            raise SessionClosed("this backend is closed; open it again")

    def _check_prompt(self, prompt: Sequence[int]) -> np.ndarray:
        tokens = check_tokens(self._model, prompt, "prompt")
        if not len(tokens):
            raise InputError("the prompt is empty")
        self._check_fits(len(tokens), "prompt")
        return tokens

    def _check_fits(self, n: int, what: str) -> None:
        if n > self.info.n_ctx:
            raise ContextOverflow(
                f"the {what} is {n} tokens long and the context holds {self.info.n_ctx}; shorten it or raise --n-ctx"
            )


def probe_steering(backend: Backend) -> bool:
    """Does a steering vector change what this model computes? Some architectures of llama.cpp ignore it."""
    n_layer, d_model = backend.info.n_layer, backend.info.d_model
    if n_layer < 2:
        return False
    array = np.random.default_rng(0).normal(size=(n_layer, d_model)).astype(np.float32) * 10
    array[0] = 0
    tokens = backend.tokenize("a")[:1] or [0]
    (base,) = backend.score(tokens, [tokens], vectors=None)
    (steered,) = backend.score(tokens, [tokens], vectors=SteeringVectors(array))
    return not np.allclose(base, steered, rtol=1e-3, atol=1e-3)


def check_steering(backend: Backend) -> None:
    """Raise BackendUnavailable where `probe_steering` finds that this model cannot be steered."""
    if not probe_steering(backend):
        raise BackendUnavailable(
            f"llama.cpp ignores steering vectors on {backend.info.architecture} models; choose another base"
        )


def _context(model: NativeModel, config: RuntimeConfig) -> NativeContext:
    return NativeContext(
        model,
        n_ctx=context_length(model, config),
        n_batch=PREFILL_CHUNK_GPU if model.gpu else PREFILL_CHUNK,
        n_threads=config.n_threads,
    )


def _version() -> str:
    import llama_cpp

    return f"llama-cpp-python {llama_cpp.__version__}"
