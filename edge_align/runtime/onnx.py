"""The ONNX Runtime engine, on a folder that `edge-align export onnx` made. Rows of a batch may be steered differently.

A prompt's cache is filled in chunks that begin at multiples of PREFILL_CHUNK and reused up to such a multiple, so that
an answer does not depend on what was asked before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from edge_align.config import RuntimeConfig, SamplingConfig
from edge_align.errors import BackendError, SessionClosed
from edge_align.onnx_files import DECODER, OnnxModel, read_export, TEMPLATE, TOKENIZER
from edge_align.records import (
    Completion,
    FinishReason,
    GenerationChunk,
    GenerationStats,
    Prompt,
    SteeringVectors,
    Tools,
)
from edge_align.runtime.base import BackendInfo
from edge_align.runtime.onnx_checks import (
    BatchVectors,
    check_fits,
    check_prompt,
    check_tokens,
    check_vectors,
    steering_rows,
)
from edge_align.runtime.onnx_session import check_graph, library, OnnxDecoder, open_session
from edge_align.runtime.sampling import draw
from edge_align.runtime.stream_text import TextStream
from edge_align.runtime.template import ChatTemplate, render_tokens
from edge_align.runtime.tokenizer import Tokenizer
from edge_align.runtime.tokens import common_prefix, rate

PREFILL_CHUNK = 128  # tokens
N_ROWS = 16
CELL_LIMIT = 16_384  # tokens of key-value cache over all rows of a batch, unless one row needs more
ONE = np.zeros(1, np.int64)


@dataclass(slots=True)
class _Row:
    """An answer being written. A row that has ended goes on being computed until its place is taken or cut off."""

    index: int
    rng: np.random.Generator
    stream: TextStream
    limit: int
    token: int  # to be decoded next
    held: int
    pieces: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    ended: bool = False


class OnnxBackend:
    """`edge_align.runtime.base.Backend` on ONNX Runtime. Use `open`; close it, or use it as a context manager."""

    def __init__(self, model: OnnxModel, session: Any, tokenizer: Tokenizer, *, n_ctx: int, device: str) -> None:
        self._model, self._session, self._tokenizer = model, session, tokenizer
        self._decoder: OnnxDecoder | None = OnnxDecoder(session, model, device=device, rows=1, room=n_ctx)
        self._cached = np.empty(0, np.int64)  # tokens whose unsteered keys and values the decoder holds
        self._turn = 0  # number of the answer that owns the decoder
        self._forks: list[OnnxBackend] = []
        self.provider_reason = ""
        self.info = BackendInfo(
            name="onnx",
            version=f"onnxruntime {library().__version__}",
            architecture=model.architecture,
            n_layer=model.n_layer,
            d_model=model.d_model,
            n_vocab=model.n_vocab,
            n_ctx=n_ctx,
            device=device,
            per_row_steering=True,
        )

    @classmethod
    def open(
        cls, folder: str | Path, *, config: RuntimeConfig | None = None, hash_cache: Path | None = None
    ) -> OnnxBackend:
        """Load an export. The context is capped at what the model was trained on (`info.n_ctx` is in effect).

        Raises CorruptArtefact, UnsupportedVersion, ModelLoadError, BackendUnavailable.
        """
        config = config or RuntimeConfig()
        model = read_export(Path(folder), hash_cache=hash_cache)
        tokenizer = Tokenizer(model.folder / TOKENIZER)
        session, provider = open_session(model.folder / DECODER, config)
        check_graph(session, model)
        opened = cls(model, session, tokenizer, n_ctx=min(config.n_ctx, model.n_ctx), device=provider.device)
        opened.provider_reason = provider.reason
        return opened

    def fork(self) -> OnnxBackend:
        """A cache of its own on the same session; see `runtime.base.Forking`. Raises BackendError."""
        self._open_decoder()
        info = self.info
        forked = OnnxBackend(self._model, self._session, self._tokenizer, n_ctx=info.n_ctx, device=info.device)
        forked.provider_reason = self.provider_reason
        self._forks.append(forked)
        return forked

    def close(self) -> None:
        for forked in self._forks:
            forked.close()
        self._decoder = self._session = None

    def __enter__(self) -> OnnxBackend:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- text and tokens -------------------------------------------------------------------------------------------
    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of `text`, no BOS added. Raises InputError for text that is not UTF-8 or over 16 MiB."""
        self._open_decoder()
        return self._tokenizer.tokenize(text, special=special)

    def detokenize(self, tokens: Sequence[int]) -> str:
        """Text of `tokens`, control tokens left out, bytes that are not UTF-8 as U+FFFD."""
        self._open_decoder()
        return self._tokenizer.detokenize(check_tokens(self.info, tokens, "token list").tolist())

    def render(self, prompt: Prompt, *, tools: Tools = ()) -> list[int]:
        """Token ids of a conversation under the model's template. Texts in messages never become control tokens."""
        self._open_decoder()
        return render_tokens(
            self.template,
            prompt,
            tools,
            tokenize=self._tokenizer.tokenize,
            control=lambda: self._tokenizer.control_pattern,
            bos=self._model.bos if self._model.adds_bos else None,
        )

    @property
    def takes_tools(self) -> bool:
        return self.template.takes_tools

    @cached_property
    def template(self) -> ChatTemplate:
        """The model's chat template. Raises ModelLoadError when it is broken."""
        model = self._model
        source = (model.folder / TEMPLATE).read_text(encoding="utf-8") if model.has_template else None
        bos, eos = (
            "" if token is None else self._tokenizer.text_of(token).decode("utf-8", "replace")
            for token in (model.bos, model.ends[0] if model.ends else None)
        )
        return ChatTemplate(source, bos_token=bos, eos_token=eos)

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

        Raises ContextOverflow, InputError at once; BackendError, SessionClosed while streaming.
        """
        self._open_decoder()
        return self._generate(check_prompt(self.info, prompt), check_vectors(self.info, vectors), sampling, cancelled)

    def _generate(
        self,
        prompt: np.ndarray,
        steering: np.ndarray | None,
        sampling: SamplingConfig,
        cancelled: Callable[[], bool] | None,
    ) -> Iterator[GenerationChunk]:
        started = perf_counter()
        decoder = self._open_decoder()
        self._turn += 1
        turn, n = self._turn, len(prompt)
        stream, rng = TextStream(sampling.stop), np.random.default_rng(sampling.seed)
        limit = min(sampling.max_tokens, self.info.n_ctx - n + 1)
        count, pending, text = 0, [], ""
        finish: FinishReason = "cancelled"
        cached = self._fill_cache(decoder, prompt[:-1], cancelled)
        prefilled = first = last = perf_counter()
        token, held = prompt[-1:].reshape(1, 1), np.array([n - 1])
        while len(self._cached) == n - 1 and not (cancelled is not None and cancelled()):
            logits = decoder.run(token, held, steering=steering, wanted=ONE)[0, 0]
            held += 1
            drawn = draw(logits, sampling, rng)
            last = perf_counter()
            first = first if count else last
            if drawn in self._model.ends:
                finish = "stop"
                break
            count += 1
            pending.append(drawn)
            text = stream.feed(self._tokenizer.piece(drawn))
            if stream.stopped or count >= limit:
                finish = "stop" if stream.stopped else "length"
                break
            token = np.array([[drawn]])
            if text:
                yield GenerationChunk(text, tuple(pending))
                if self._turn != turn or self._decoder is None:
                    self._open_decoder()
                    raise BackendError("another answer was started before this one ended")
                text, pending = "", []
        stats = GenerationStats(
            prompt_tokens=n,
            cached_tokens=cached,
            completion_tokens=count,
            ttft_sec=first - started,
            generation_sec=last - first,
            prompt_tps=rate(n - 1 - cached, prefilled - started),
            generation_tps=rate(count - 1, last - first),
        )
        yield GenerationChunk(text + stream.finish(), tuple(pending), finish, stats)

    # -- prompts that were prefilled -------------------------------------------------------------------------------
    @property
    def held(self) -> np.ndarray:
        """(n,) int32: the prompt tokens whose unsteered keys and values are cached."""
        return self._cached.astype(np.int32)

    def save_prompt(self) -> bytes:
        """The keys and values of `held`, for `load_prompt` of a fork."""
        return self._open_decoder().save(len(self._cached))

    def load_prompt(self, tokens: np.ndarray, data: bytes) -> bool:
        """Take over what a fork saved; the same floats, bit for bit. False, and an empty cache, when refused."""
        self.forget_prompt()
        if not self._open_decoder().load(data, len(tokens)):
            return False
        self._cached = tokens.astype(np.int64)
        return True

    def forget_prompt(self) -> None:
        """Empty the cache; an unfinished answer then raises BackendError."""
        self._open_decoder()
        self._turn += 1
        self._cached = self._cached[:0]

    def _fill_cache(self, decoder: OnnxDecoder, tokens: np.ndarray, cancelled: Callable[[], bool] | None) -> int:
        """Make the first row hold exactly `tokens`, unsteered; returns how many it held before.

        What was decoded under steering lies behind `_cached` and is overwritten, never read.
        """
        keep = common_prefix(self._cached, tokens)
        if not keep == len(tokens) == len(self._cached):
            keep -= keep % PREFILL_CHUNK
        self._cached = self._cached[:keep]
        for start in range(keep, len(tokens), PREFILL_CHUNK):
            if cancelled is not None and cancelled():
                break
            part = tokens[None, start : start + PREFILL_CHUNK]
            decoder.run(part, np.array([start]), steering=None, wanted=ONE)
            self._cached = tokens[: start + part.shape[1]]
        return keep

    # -- many rows -------------------------------------------------------------------------------------------------
    def generate_batch(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        vectors: BatchVectors,
        sampling: SamplingConfig,
        on_done: Callable[[int], None] | None = None,
    ) -> list[Completion]:
        """One answer per prompt, up to 16 decoded together; row i uses seed `sampling.seed + i`.

        vectors: the same for all rows, or a sequence with an entry (or None) for each. The same call gives the same
        answers; they may differ from `generate`'s in rare tokens: a batch adds floats in another order. Completions
        carry no stats. Raises ContextOverflow, InputError, BackendError, SessionClosed.
        """
        one = self._open_decoder()
        checked = [check_prompt(self.info, prompt) for prompt in prompts]
        if not checked:
            return []
        steering = steering_rows(self.info, vectors, len(checked))
        longest = max(len(prompt) for prompt in checked)
        room = min(longest + sampling.max_tokens, self.info.n_ctx)
        size = max(1, min(len(checked), N_ROWS, CELL_LIMIT // room))
        decoder = OnnxDecoder(self._session, self._model, device=one.device, rows=size, room=room)
        answers: list[Completion | None] = [None] * len(checked)
        waiting = [*range(len(checked))][::-1]
        rows: list[_Row] = []
        done = 0
        order: list[int] = []
        given = steering
        while waiting or rows:
            for place in range(size):
                if waiting and (place == len(rows) or rows[place].ended):
                    rows[place : place + 1] = [self._start_row(decoder, place, waiting.pop(), checked, sampling)]
            if steering is not None and len(steering) > 1 and order != [row.index for row in rows]:
                order = [row.index for row in rows]
                given = steering[order]
            self._step(decoder, rows, given, sampling)
            for row in rows:
                if row.ended and answers[row.index] is None:
                    finish: FinishReason = (
                        "length" if len(row.tokens) >= row.limit and not row.stream.stopped else "stop"
                    )
                    text = "".join(row.pieces) + row.stream.finish()
                    answers[row.index] = Completion(text, tuple(row.tokens), finish)
                    done += 1
                    if on_done is not None:
                        on_done(done)
            while not waiting and rows and rows[-1].ended:
                rows.pop()
        return [answer for answer in answers if answer is not None]

    def _start_row(
        self, decoder: OnnxDecoder, place: int, index: int, prompts: list[np.ndarray], sampling: SamplingConfig
    ) -> _Row:
        prompt = prompts[index]
        for start in range(0, len(prompt) - 1, PREFILL_CHUNK):
            part = prompt[None, start : min(start + PREFILL_CHUNK, len(prompt) - 1)]
            decoder.run(part, np.array([start]), steering=None, wanted=ONE, row=place)
        return _Row(
            index=index,
            rng=np.random.default_rng((sampling.seed + index) % 2**32),
            stream=TextStream(sampling.stop),
            limit=min(sampling.max_tokens, self.info.n_ctx - len(prompt) + 1),
            token=int(prompt[-1]),
            held=len(prompt) - 1,
        )

    def _step(
        self, decoder: OnnxDecoder, rows: list[_Row], steering: np.ndarray | None, sampling: SamplingConfig
    ) -> None:
        """Decode one token for every row."""
        tokens = np.array([[row.token] for row in rows])
        logits = decoder.run(tokens, np.array([row.held for row in rows]), steering=steering, wanted=ONE)
        for i, row in enumerate(rows):
            if row.ended:
                continue
            row.held += 1
            row.token = draw(logits[i, 0], sampling, row.rng)
            if row.token in self._model.ends:
                row.ended = True
                continue
            row.tokens.append(row.token)
            row.pieces.append(row.stream.feed(self._tokenizer.piece(row.token)))
            row.ended = row.stream.stopped or len(row.tokens) >= row.limit

    def score(
        self,
        prompt: Sequence[int],
        completions: Sequence[Sequence[int]],
        *,
        vectors: SteeringVectors | None,
    ) -> list[np.ndarray]:
        """Teacher-forced logits, see the protocol. Memory: 4 * n_vocab bytes per completion token."""
        decoder = self._open_decoder()
        self._turn += 1
        tokens, steering = check_prompt(self.info, prompt), check_vectors(self.info, vectors)
        checked = [check_tokens(self.info, completion, "completion") for completion in completions]
        for completion in checked:
            check_fits(self.info, len(tokens) + len(completion) - 1, "prompt with its completion")
        self._fill_cache(decoder, tokens[:-1], None)
        scores = []
        for completion in checked:
            out = np.empty((len(completion), self.info.n_vocab), np.float32)
            inputs = np.concatenate([tokens[-1:], completion[:-1]])[: len(completion)]
            for start in range(0, len(inputs), PREFILL_CHUNK):
                part = inputs[None, start : start + PREFILL_CHUNK]
                n, held = part.shape[1], np.array([len(tokens) - 1 + start])
                out[start : start + n] = decoder.run(part, held, steering=steering, wanted=np.arange(n))[0]
            scores.append(out)
        return scores

    def score_many(
        self,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        *,
        vectors: SteeringVectors | None,
    ) -> Iterator[np.ndarray]:
        """`score` of completion i after prompt i, one array at a time. Raises as `score`, while iterating."""
        for prompt, completion in zip(prompts, completions, strict=True):
            yield from self.score(prompt, [completion], vectors=vectors)

    def _open_decoder(self) -> OnnxDecoder:
        if self._decoder is None:
            raise SessionClosed("this backend is closed; open it again")
        return self._decoder
