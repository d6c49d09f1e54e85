"""The ONNX Runtime engine, on a folder that `edge-align export onnx` made. Rows of a batch may be steered differently.

A prompt's cache is filled in chunks that begin at multiples of PREFILL_CHUNK and reused up to such a multiple, so that
an answer does not depend on what was asked before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
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
    join_chunks,
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
from edge_align.runtime.onnx_rows import OnnxRow, OnnxRows, same_in_any_batch
from edge_align.runtime.onnx_session import check_graph, library, OnnxDecoder, open_session
from edge_align.runtime.sampling import draw
from edge_align.runtime.stream_text import TextStream
from edge_align.runtime.template import CHATML, ChatTemplate, render_tokens
from edge_align.runtime.tokenizer import Tokenizer
from edge_align.runtime.tokens import common_prefix, rate

PREFILL_CHUNK = 128  # tokens
N_ROWS = 16
CELL_LIMIT = 16_384  # tokens of key-value cache over all rows of a batch, unless one row needs more


class OnnxBackend:
    """`edge_align.runtime.base.Backend` on ONNX Runtime. Use `open`; close it, or use it as a context manager."""

    def __init__(
        self, model: OnnxModel, session: Any, tokenizer: Tokenizer, *, row: OnnxRow, info: BackendInfo, reason: str = ""
    ) -> None:
        self._model, self._session, self._tokenizer = model, session, tokenizer
        self._row: OnnxRow | None = row
        self._cached = np.empty(0, np.int64)  # tokens whose unsteered keys and values the row holds
        self._turn = 0  # number of the answer that owns the row
        self._forks: list[OnnxBackend] = []
        self.info, self.provider_reason = info, reason

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
        n_ctx = min(config.n_ctx, model.n_ctx)
        info = BackendInfo(
            name="onnx",
            version=f"onnxruntime {library().__version__}",
            architecture=model.architecture,
            n_layer=model.n_layer,
            d_model=model.d_model,
            n_vocab=model.n_vocab,
            n_ctx=n_ctx,
            device=provider.device,
            per_row_steering=True,
        )
        decoder = OnnxDecoder(session, model, device=provider.device, rows=config.n_rows, room=n_ctx)
        rows = OnnxRows(decoder, together=decoder.rows == 1 or same_in_any_batch(decoder))
        return cls(model, session, tokenizer, row=_taken(rows), info=info, reason=provider.reason)

    def fork(self) -> OnnxBackend:
        """A cache of its own on the same session; see `runtime.base.Forking`. Raises BackendError.

        Of `RuntimeConfig.n_rows` in all, this engine included, answers that take turns are decoded in one batch.
        """
        row = self._open_row().rows.take() or _taken(self._new_rows(1, self.info.n_ctx))
        forked = self._with(row)
        self._forks.append(forked)
        return forked

    def _with(self, row: OnnxRow) -> OnnxBackend:
        return OnnxBackend(
            self._model, self._session, self._tokenizer, row=row, info=self.info, reason=self.provider_reason
        )

    def _new_rows(self, n: int, room: int) -> OnnxRows:
        return OnnxRows(OnnxDecoder(self._session, self._model, device=self.info.device, rows=n, room=room))

    def close(self) -> None:
        for forked in self._forks:
            forked.close()
        if self._row is not None:
            self._row.release()
        self._row = self._session = None

    def __enter__(self) -> OnnxBackend:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- text and tokens -------------------------------------------------------------------------------------------
    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of `text`, no BOS added. Raises InputError for text that is not UTF-8 or over 16 MiB."""
        self._open_row()
        return self._tokenizer.tokenize(text, special=special)

    def detokenize(self, tokens: Sequence[int]) -> str:
        """Text of `tokens`, control tokens left out, bytes that are not UTF-8 as U+FFFD."""
        self._open_row()
        return self._tokenizer.detokenize(check_tokens(self.info, tokens, "token list").tolist())

    def render(self, prompt: Prompt, *, tools: Tools = ()) -> list[int]:
        """Token ids of a conversation under the model's template. Texts in messages never become control tokens."""
        self._open_row()
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
        source = (model.folder / TEMPLATE).read_text(encoding="utf-8") if model.has_template else CHATML
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
        self._open_row()
        return self._generate(check_prompt(self.info, prompt), check_vectors(self.info, vectors), sampling, cancelled)

    def _generate(
        self,
        prompt: np.ndarray,
        steering: np.ndarray | None,
        sampling: SamplingConfig,
        cancelled: Callable[[], bool] | None,
    ) -> Iterator[GenerationChunk]:
        started = perf_counter()
        row = self._open_row()
        self._turn += 1
        turn, n = self._turn, len(prompt)
        stream, rng = TextStream(sampling.stop), np.random.default_rng(sampling.seed)
        limit = min(sampling.max_tokens, self.info.n_ctx - n + 1)
        count, pending, text = 0, [], ""
        finish: FinishReason = "cancelled"
        cached = self._keep(prompt[:-1])
        for start in range(cached, n - 1, PREFILL_CHUNK):
            if cancelled is not None and cancelled():
                break
            self._fill(row, prompt[:-1], start)
            yield GenerationChunk("", ())
            self._check_turn(turn)
        prefilled = first = last = perf_counter()
        token, held = int(prompt[-1]), n - 1
        while len(self._cached) == n - 1 and not (cancelled is not None and cancelled()):
            row.ask(token, held, steering)
            if row.shared:  # answers in the other rows ask, too, before anything is computed
                try:
                    yield GenerationChunk("", ())
                except GeneratorExit:
                    if self._turn == turn:
                        row.withdraw()
                    raise
                self._check_turn(turn)
            token = draw(row.logits(), sampling, rng)
            held += 1
            last = perf_counter()
            first = first if count else last
            if token in self._model.ends:
                finish = "stop"
                break
            count += 1
            pending.append(token)
            text = stream.feed(self._tokenizer.piece(token))
            if stream.stopped or count >= limit:
                finish = "stop" if stream.stopped else "length"
                break
            if text:
                yield GenerationChunk(text, tuple(pending))
                self._check_turn(turn)
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

    def _check_turn(self, turn: int) -> None:
        if self._turn != turn or self._row is None:
            self._open_row()
            raise BackendError("another answer was started before this one ended")

    # -- prompts that were prefilled -------------------------------------------------------------------------------
    @property
    def held(self) -> np.ndarray:
        """(n,) int32: the prompt tokens whose unsteered keys and values are cached."""
        return self._cached.astype(np.int32)

    def save_prompt(self) -> bytes:
        """The keys and values of `held`, for `load_prompt` of a fork."""
        return self._open_row().save(len(self._cached))

    def load_prompt(self, tokens: np.ndarray, data: bytes) -> bool:
        """Take over what a fork saved; the same floats, bit for bit. False, and an empty cache, when refused."""
        self.forget_prompt()
        if not self._open_row().load(data, len(tokens)):
            return False
        self._cached = tokens.astype(np.int64)
        return True

    def forget_prompt(self) -> None:
        """Empty the cache; an unfinished answer then raises BackendError."""
        self._open_row().withdraw()
        self._turn += 1
        self._cached = self._cached[:0]

    def _keep(self, tokens: np.ndarray) -> int:
        """Drop what the row holds behind what it shares with `tokens`; how many are kept.

        What was decoded under steering lies behind `_cached` and is overwritten, never read.
        """
        keep = common_prefix(self._cached, tokens)
        if not keep == len(tokens) == len(self._cached):
            keep -= keep % PREFILL_CHUNK
        self._cached = self._cached[:keep]
        return keep

    def _fill(self, row: OnnxRow, tokens: np.ndarray, start: int) -> None:
        """Read the chunk of `tokens` from `start` on, unsteered; those before it are held."""
        part = tokens[start : start + PREFILL_CHUNK]
        row.fill(part, start)
        self._cached = tokens[: start + len(part)]

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
        self._open_row()
        checked = [check_prompt(self.info, prompt) for prompt in prompts]
        if not checked:
            return []
        steering = steering_rows(self.info, vectors, len(checked))
        room = min(max(len(prompt) for prompt in checked) + sampling.max_tokens, self.info.n_ctx)
        rows = self._new_rows(max(1, min(len(checked), N_ROWS, CELL_LIMIT // room)), room)
        free = [self._with(row) for row in iter(rows.take, None)][::-1]
        waiting = [*range(len(checked))][::-1]
        running: dict[int, tuple[OnnxBackend, Iterator[GenerationChunk], list[GenerationChunk]]] = {}
        answers: dict[int, Completion] = {}
        while waiting or running:
            while waiting and free:
                index, backend = waiting.pop(), free.pop()
                own = replace(sampling, seed=(sampling.seed + index) % 2**32)
                running[index] = backend, backend._generate(checked[index], steering[index], own, None), []
            for index, (backend, stream, chunks) in list(running.items()):
                for chunk in stream:
                    chunks.append(chunk)
                    if not chunk.tokens:
                        break
                if chunks[-1].finish_reason is not None:
                    answers[index] = replace(join_chunks(chunks), stats=None)
                    del running[index]
                    free.append(backend)
                    if on_done is not None:
                        on_done(len(answers))
        return [answers[index] for index in range(len(checked))]

    def score(
        self,
        prompt: Sequence[int],
        completions: Sequence[Sequence[int]],
        *,
        vectors: SteeringVectors | None,
    ) -> list[np.ndarray]:
        """Teacher-forced logits, see the protocol. Memory: 4 * n_vocab bytes per completion token."""
        row = self._open_row()
        self._turn += 1
        tokens, steering = check_prompt(self.info, prompt), check_vectors(self.info, vectors)
        checked = [check_tokens(self.info, completion, "completion") for completion in completions]
        for completion in checked:
            check_fits(self.info, len(tokens) + len(completion) - 1, "prompt with its completion")
        for start in range(self._keep(tokens[:-1]), len(tokens) - 1, PREFILL_CHUNK):
            self._fill(row, tokens[:-1], start)
        scores = []
        for completion in checked:
            out = np.empty((len(completion), self.info.n_vocab), np.float32)
            inputs = np.concatenate([tokens[-1:], completion[:-1]])[: len(completion)]
            for start in range(0, len(inputs), PREFILL_CHUNK):
                part = inputs[start : start + PREFILL_CHUNK]
                out[start : start + len(part)] = row.score(part, len(tokens) - 1 + start, steering)
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

    def _open_row(self) -> OnnxRow:
        if self._row is None:
            raise SessionClosed("this backend is closed; open it again")
        return self._row


def _taken(rows: OnnxRows) -> OnnxRow:
    row = rows.take()
    assert row is not None
    return row
