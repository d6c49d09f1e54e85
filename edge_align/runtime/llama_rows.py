"""Many rows at once on llama.cpp: sampling and teacher-forced scoring in a context of their own.

Every row has a stream of its own in the KV cache. A stream remembers the unsteered prompt it holds, so a prompt that
is there is not computed again, and one that begins like another starts from a copy. llama.cpp decodes rows together
only when their stream numbers are consecutive: when a row ends, the last row takes its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, ExitStack
from dataclasses import dataclass, field

import numpy as np

from edge_align.config import SamplingConfig
from edge_align.errors import BackendError, SessionClosed
from edge_align.records import Completion, FinishReason, SteeringVectors
from edge_align.runtime.llama_native import NativeContext, NativeModel
from edge_align.runtime.llama_sampler import Sampler
from edge_align.runtime.stream_text import TextStream
from edge_align.runtime.tokens import common_prefix

N_ROWS = 32
CELL_LIMIT = 16_384  # tokens of KV cache over all rows (376 MB on the default base), unless one row needs more
N_BATCH = 128  # also the logits held at once: 128 rows of 49,152 are 25 MB
WORTH_COPYING = 8  # tokens shared with another row; computing fewer is faster than copying the stream


@dataclass(slots=True)
class _Row:
    """An answer being written."""

    index: int
    sampler: Sampler
    stream: TextStream
    limit: int
    token: int  # to be decoded next
    position: int
    pieces: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)


class Rows:
    """The context for many rows; opened when first used, and again when longer rows are asked for."""

    def __init__(self, model: NativeModel, *, n_ctx: int, n_threads: int) -> None:
        self._model, self._n_ctx, self._n_threads = model, n_ctx, n_threads
        self._open: NativeContext | None = None
        self._held: list[np.ndarray] = []  # per stream: the unsteered prompt tokens it holds
        self._read: list[bytes] = []  # prompts read since the cache was empty, in that order, up to one too many
        self._turn = 0
        self._closed = False

    def close(self) -> None:
        self._closed = True
        self._shut()

    def _shut(self) -> None:
        context, self._open = self._open, None
        if context is not None:
            context.close()

    def _context(self, length: int, rows: int) -> NativeContext:
        """A context whose rows hold at least `length` tokens, with up to `rows` of them."""
        length = min(-(-length // 256) * 256, -(-self._n_ctx // 256) * 256)
        rows = max(1, min(rows, N_ROWS, CELL_LIMIT // length))
        now = self._open
        if now is not None and now.n_ctx >= length and now.n_seq >= rows:
            return now
        self._shut()
        self._open = NativeContext(
            self._model,
            n_ctx=length,
            n_batch=N_BATCH,
            n_threads=self._n_threads,
            n_seq=rows,
            n_outputs=N_BATCH,
        )
        self._held, self._read = [np.empty(0, np.int32) for _ in range(rows)], []
        return self._open

    # -- prompts ---------------------------------------------------------------------------------------------------
    def _load(self, context: NativeContext, stream: int, prompt: np.ndarray) -> None:
        """Make a stream hold `prompt`, unsteered, from what it or another stream holds already."""
        if np.array_equal(self._held[stream], prompt):
            return
        shared = [common_prefix(held, prompt) for held in self._held]
        best = int(np.argmax(shared))
        keep = shared[stream]
        if shared[best] >= keep + WORTH_COPYING:
            context.copy(best, stream)
            self._held[stream] = self._held[best]
            keep = shared[best]
        if not context.forget(stream, keep):  # a copied row may have an answer after its prompt
            keep = 0
        self._held[stream] = prompt[:keep]
        if keep < len(prompt):
            context.set_vectors(None)
        for start in range(keep, len(prompt), N_BATCH):
            context.decode_span(prompt[start : start + N_BATCH], start, seq=stream)
        self._held[stream] = prompt
        if len(self._read) <= context.n_seq:
            self._read.append(prompt.tobytes())

    def _unsteer(self, context: NativeContext, stream: int) -> None:
        """Drop everything after the prompt."""
        if not context.forget(stream, len(self._held[stream])):
            self._held[stream] = self._held[stream][:0]

    def _reset(self, context: NativeContext) -> None:
        context.clear()
        self._held, self._read = [held[:0] for held in self._held], []

    def _as_if_read_now(self, prompts: list[np.ndarray]) -> bool:
        """Does stream i hold prompt i, and were these alone read, in this order, into an empty cache?"""
        return self._read == [prompt.tobytes() for prompt in prompts] and all(
            np.array_equal(held, prompt) for held, prompt in zip(self._held, prompts, strict=False)
        )

    # -- scoring ---------------------------------------------------------------------------------------------------
    def score(self, jobs: list[tuple[np.ndarray, np.ndarray]], vectors: SteeringVectors | None) -> Iterator[np.ndarray]:
        """Logits (T_i, n_vocab) of each (prompt, completion): a window of prompts unsteered, then all it completes."""
        if not jobs:
            return
        self._turn += 1
        turn = self._turn
        self._check_turn(turn)
        prompts = {prompt.tobytes(): prompt for prompt, _ in jobs}
        context = self._context(max(len(p) + len(c) for p, c in jobs), len(prompts))
        for window in _windows(jobs, context.n_seq):
            self._check_turn(turn)
            try:
                streams = self._place(context, [prompt[:-1] for prompt, _ in window])
            except BackendError:
                self._reset(context)
                raise
            for (prompt, completion), stream in zip(window, streams, strict=True):
                self._check_turn(turn)
                yield self._score_one(context, stream, prompt, completion, vectors)

    def _place(self, context: NativeContext, prompts: list[np.ndarray]) -> list[int]:
        """Load each distinct prompt into a stream; streams that hold one of them already keep it."""
        wanted = {prompt.tobytes(): prompt for prompt in prompts}
        placed = {held.tobytes(): stream for stream, held in enumerate(self._held) if held.tobytes() in wanted}
        free = [stream for stream in range(context.n_seq) if stream not in placed.values()]
        for key, prompt in wanted.items():
            if key not in placed:
                placed[key] = free.pop(0)
                self._load(context, placed[key], prompt)
        return [placed[prompt.tobytes()] for prompt in prompts]

    def _score_one(
        self,
        context: NativeContext,
        stream: int,
        prompt: np.ndarray,
        completion: np.ndarray,
        vectors: SteeringVectors | None,
    ) -> np.ndarray:
        out = np.empty((len(completion), self._model.n_vocab), np.float32)
        inputs = np.concatenate([prompt[-1:], completion[:-1]])[: len(completion)]
        try:
            self._load(context, stream, prompt[:-1])  # gone after the last answer where caches cannot be cut
            context.set_vectors(vectors)
            for start in range(0, len(inputs), N_BATCH):
                part = inputs[start : start + N_BATCH]
                context.decode_span(part, len(prompt) - 1 + start, seq=stream, outputs=True)
                out[start : start + len(part)] = context.logits(len(part))
        except BackendError:
            self._reset(context)
            raise
        self._unsteer(context, stream)
        return out

    def _check_turn(self, turn: int) -> None:
        if self._closed:
            raise SessionClosed("this backend is closed; open it again")
        if turn != self._turn:
            raise BackendError("other rows were started before these ended")

    # -- sampling --------------------------------------------------------------------------------------------------
    def generate(
        self,
        prompts: list[np.ndarray],
        vectors: SteeringVectors | None,
        sampling: SamplingConfig,
        on_done: Callable[[int], None] | None,
    ) -> list[Completion]:
        """One answer per prompt. Freed rows are refilled at once: clearing the vector for it costs milliseconds."""
        if not prompts:
            return []
        self._turn += 1
        longest = max(len(prompt) for prompt in prompts)
        context = self._context(min(longest + sampling.max_tokens, self._n_ctx), len(prompts))
        if not self._as_if_read_now([prompt[:-1] for prompt in prompts[: context.n_seq]]):
            self._reset(context)  # so that the same call always computes the same
        answers: list[Completion | None] = [None] * len(prompts)
        waiting = list(reversed(range(len(prompts))))
        rows: list[_Row] = []
        done = 0
        with ExitStack() as stack:
            try:
                while waiting or rows:
                    while waiting and len(rows) < context.n_seq:
                        index = waiting.pop()
                        prompt = prompts[index]
                        self._load(context, len(rows), prompt[:-1])
                        sampler = stack.enter_context(closing(Sampler(self._model, sampling, sampling.seed + index)))
                        limit = min(sampling.max_tokens, self._n_ctx - len(prompt) + 1)
                        text = TextStream(sampling.stop)
                        rows.append(_Row(index, sampler, text, limit, int(prompt[-1]), len(prompt) - 1))
                    context.set_vectors(vectors)
                    for stream in reversed(self._step(context, rows, answers)):
                        self._remove(context, rows, stream)
                        done += 1
                        if on_done is not None:
                            on_done(done)
            except BackendError:
                self._reset(context)
                raise
            else:
                return [answer for answer in answers if answer is not None]
            finally:
                if rows and not self._closed:  # interrupted: the streams hold steered text
                    self._reset(context)

    def _step(self, context: NativeContext, rows: list[_Row], answers: list[Completion | None]) -> list[int]:
        """Decode one token for every row; returns the rows that ended."""
        n = len(rows)
        context.token[:n] = [row.token for row in rows]
        context.pos[:n] = [row.position for row in rows]
        context.seq[:n] = np.arange(n)
        context.wanted[:n] = 1
        context.decode(n)
        sample, handle = context.C.llama_sampler_sample, context.pointer
        ended = []
        for i, row in enumerate(rows):
            token = row.token = sample(row.sampler.chain, handle, i)
            row.position += 1
            finish: FinishReason | None = None
            if self._model.is_end(token):
                finish = "stop"
            else:
                row.tokens.append(token)
                row.pieces.append(row.stream.feed(self._model.piece(token)))
                if row.stream.stopped:
                    finish = "stop"
                elif len(row.tokens) >= row.limit:
                    finish = "length"
            if finish is not None:
                text = "".join(row.pieces) + row.stream.finish()
                answers[row.index] = Completion(text, tuple(row.tokens), finish)
                ended.append(i)
        return ended

    def _remove(self, context: NativeContext, rows: list[_Row], stream: int) -> None:
        """End a row; the last row moves into its stream."""
        last = rows.pop()
        if stream == len(rows):
            last.sampler.close()
        else:
            rows[stream].sampler.close()
            context.copy(len(rows), stream)
            self._held[stream] = self._held[len(rows)]
            rows[stream] = last
        self._unsteer(context, len(rows))


def _windows(jobs: list[tuple[np.ndarray, np.ndarray]], size: int) -> Iterator[list[tuple[np.ndarray, np.ndarray]]]:
    """Runs of consecutive jobs with at most `size` different prompts."""
    window: list[tuple[np.ndarray, np.ndarray]] = []
    seen: set[bytes] = set()
    for job in jobs:
        key = job[0].tobytes()
        if key not in seen and len(seen) == size:
            yield window
            window, seen = [], set()
        window.append(job)
        seen.add(key)
    if window:
        yield window
