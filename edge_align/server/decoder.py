"""The one thread that owns the engine: it loads it, decodes every answer in slices, and alone touches native code.

Answers wait in one bounded queue. Up to `slots` of them are unfinished at a time, each in a context of its own on the
shared weights, and take turns: `slice_tokens` are decoded, or a part of a prompt is read, so that a long prompt does
not stop those that are being answered. Of those that wait, one whose profile has the fewest slots is next. So what an
answer is depends on its own messages, profile, strength, sampling and seed, and on nothing that runs beside.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from edge_align.config import SamplingConfig, ServerConfig
from edge_align.errors import BackendError, EdgeAlignError
from edge_align.records import GenerationChunk, SteeringVectors
from edge_align.runtime.base import Backend, check_sampling, Forking
from edge_align.runtime.tokens import common_prefix
from edge_align.server.engine import Engine
from edge_align.server.prompt_cache import PromptCache
from edge_align.server.refusal import busy, loading, Refusal

log = logging.getLogger("edge_align.server")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Plan:
    """What is decoded: token ids, the vectors, and under which profile version (None: the base)."""

    tokens: Sequence[int]
    vectors: SteeringVectors | None
    sampling: SamplingConfig
    profile: str | None = None
    version: int | None = None
    strength: float = 0.0


@dataclass(frozen=True, slots=True)
class Decoded:
    """A chunk, with the texts of the tokens in its logprobs. `first_sec`: waiting included."""

    chunk: GenerationChunk
    names: dict[int, str]
    first_sec: float


Event = Plan | Decoded | Exception


@dataclass(eq=False)
class Job:
    """One answer. `prepare` runs on the owner's thread; `deliver` gets the Plan, then Decoded ones or an error."""

    owner: str  # whose prompt cache
    lane: str  # the profile, for taking turns
    prepare: Callable[[Engine], Plan]
    deliver: Callable[[Event], None]
    deadline: float  # time.monotonic()
    gone: threading.Event = field(default_factory=threading.Event)  # the client does not wait any more
    queued: float = field(default_factory=time.monotonic)

    def over(self) -> bool:
        return self.gone.is_set() or time.monotonic() > self.deadline


@dataclass(eq=False)
class Slot:
    """A context, and the answer in it."""

    backend: Backend
    owner: str = ""
    job: Job | None = None
    stream: Iterator[GenerationChunk] | None = None
    first_sec: float = 0.0


class Decoder:
    """See the module. `submit` and `call` are for the event loop's thread."""

    def __init__(self, open_engine: Callable[[], Engine], config: ServerConfig) -> None:
        self._open, self._config = open_engine, config
        self._wake = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._calls: deque[Callable[[Engine], None]] = deque()
        self._slots: list[Slot] = []
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="edge-align-decoder", daemon=True)
        self.cache = PromptCache(config.cache_mib << 20)
        self.state = "loading"  # "ready", "failed", "closed"
        self.failure = ""

    def start(self) -> None:
        self._thread.start()

    def close(self, timeout_sec: float = 10.0) -> None:
        """End the thread; unfinished answers get an error."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread.ident is not None:
            self._thread.join(timeout_sec)

    @property
    def load(self) -> tuple[int, int]:
        """(answers being decoded, answers waiting)."""
        return sum(slot.job is not None for slot in self._slots), len(self._waiting)

    def check(self) -> None:
        """Raise the Refusal that a request gets now, if it gets one."""
        if self.state == "loading":
            raise loading()
        if self.state != "ready":
            raise Refusal(503, "the engine is not running; the server's log says why", code="engine", retry_after=30)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue all of `jobs` or none. Raises Refusal: 503 while loading, 429 when the queue is full."""
        self.check()
        with self._wake:
            free = self._config.slots - sum(slot.job is not None for slot in self._slots)
            if len(self._waiting) + len(jobs) > self._config.queue + max(0, free):
                raise busy()
            self._waiting.extend(jobs)
            self._wake.notify()

    async def call(self, function: Callable[[Engine], T]) -> T:
        """Run something short on the owner's thread, between two slices. Raises what it raises, and as `submit`."""
        self.check()
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def settle(result: T | None, error: BaseException | None) -> None:
            if not future.done():
                if error is not None:
                    future.set_exception(error)
                else:
                    future.set_result(result)  # type: ignore[arg-type]

        def run(engine: Engine) -> None:
            result, error = None, None
            try:
                result = function(engine)
            except Exception as raised:
                error = raised
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(settle, result, error)

        with self._wake:
            if len(self._calls) >= self._config.queue:
                raise busy()
            self._calls.append(run)
            self._wake.notify()
        return await future

    # -- the owner's thread ----------------------------------------------------------------------------------------
    def _run(self) -> None:
        try:
            engine = self._open()
        except Exception as error:
            self.failure = str(error) if isinstance(error, EdgeAlignError) else f"unexpected {type(error).__name__}"
            log.error("the engine does not start: %s", self.failure)
            self.state = "failed"
            return
        self._slots = [Slot(engine.backend)]
        self.state = "ready"
        try:
            while self._wait():
                self._turn(engine)
        finally:
            self.state = "closed"
            for slot in self._slots:
                self._end(slot, Refusal(503, "the server is shutting down", code="closing"))
            for job in self._waiting:
                job.deliver(Refusal(503, "the server is shutting down", code="closing"))
            engine.backend.close()

    def _wait(self) -> bool:
        """Sleep until there is something to do; False at the end."""
        with self._wake:
            while not (self._closing or self._calls or self._waiting or any(slot.job for slot in self._slots)):
                self._wake.wait()
            return not self._closing

    def _turn(self, engine: Engine) -> None:
        while self._calls:
            self._calls.popleft()(engine)
        self._admit(engine)
        for slot in sorted(self._slots, key=lambda slot: slot.first_sec > 0.0):  # who waits for a first token is first
            if slot.job is not None:
                self._slice(slot)

    def _admit(self, engine: Engine) -> None:
        with self._wake:
            for job in [job for job in self._waiting if job.over()]:
                self._waiting.remove(job)
                job.deliver(Refusal(503, "the request waited too long", code="timeout", retry_after=5))
        while self._waiting:
            slot = self._free_slot(engine)
            if slot is None:
                return
            with self._wake:
                busy_lanes = Counter(other.job.lane for other in self._slots if other.job is not None)
                job = min(self._waiting, key=lambda waiting: busy_lanes[waiting.lane])  # the first of the least busy
                self._waiting.remove(job)
            self._begin(engine, slot, job)

    def _free_slot(self, engine: Engine) -> Slot | None:
        free = [slot for slot in self._slots if slot.job is None]
        if not free and len(self._slots) < self._config.slots and isinstance(engine.backend, Forking):
            self._slots.append(Slot(engine.backend.fork()))
            free = self._slots[-1:]
        return free[0] if free else None

    @property
    def _has_room(self) -> bool:
        return len(self._slots) < self._config.slots or any(slot.job is None for slot in self._slots)

    def _begin(self, engine: Engine, slot: Slot, job: Job) -> None:
        try:
            plan = job.prepare(engine)
            check_sampling(slot.backend.info, plan.sampling)
            slot = self._place(slot, job.owner, np.asarray(plan.tokens[:-1], np.int32))
            slot.stream = slot.backend.generate(
                plan.tokens, vectors=plan.vectors, sampling=plan.sampling, cancelled=job.over
            )
            slot.job, slot.first_sec = job, 0.0
            job.deliver(plan)
        except Exception as error:
            job.deliver(error)

    def _place(self, slot: Slot, owner: str, tokens: np.ndarray) -> Slot:
        """The free slot that holds most of the prompt, filled from the cache where that holds more.

        What a slot holds of another owner is dropped first.
        """
        if not isinstance(slot.backend, Forking):
            return slot
        free = [other for other in self._slots if other.job is None and isinstance(other.backend, Forking)]
        shared = [self._shared(other, owner, tokens) for other in free]
        best = int(np.argmax(shared))
        slot, backend = free[best], free[best].backend
        assert isinstance(backend, Forking)
        if slot.owner != owner:
            backend.forget_prompt()
            slot.owner = owner
        kept, length = self.cache.find(owner, tokens)
        if kept is not None and length > shared[best]:
            backend.load_prompt(kept.tokens, kept.data)
        return slot

    @staticmethod
    def _shared(slot: Slot, owner: str, tokens: np.ndarray) -> int:
        if slot.owner != owner or not isinstance(slot.backend, Forking):
            return 0
        return common_prefix(slot.backend.held, tokens)

    def _slice(self, slot: Slot) -> None:
        """Decode for one answer until its slice is over, it ends, or somebody new could begin."""
        assert slot.job is not None and slot.stream is not None
        count = 0
        while count < self._config.slice_tokens and not self._closing:
            try:
                chunk = next(slot.stream)
            except StopIteration:
                self._end(slot, BackendError("the engine ended an answer without saying why"))
                return
            except Exception as error:
                self._end(slot, error)
                return
            if not chunk.tokens and chunk.finish_reason is None:
                return  # a part of a long prompt was read: as good as a slice
            slot.first_sec = slot.first_sec or time.monotonic() - slot.job.queued
            names = {}
            if chunk.logprobs:
                tokens = {token for one in chunk.logprobs for token in (one.token, *(other for other, _ in one.top))}
                names = {token: slot.backend.detokenize([token]) for token in tokens}
            slot.job.deliver(Decoded(chunk, names, slot.first_sec))
            if chunk.finish_reason is not None:
                self._end(slot, None)
                return
            count += len(chunk.tokens)
            if self._calls or (self._waiting and self._has_room):
                return

    def _end(self, slot: Slot, error: Exception | None) -> None:
        job, slot.job, slot.stream = slot.job, None, None
        if job is not None and error is not None:
            job.deliver(error)
        backend = slot.backend
        if job is None or error is not None or not isinstance(backend, Forking):
            return
        if not self.cache.covers(job.owner, backend.held):
            with suppress(BackendError):
                self.cache.put(job.owner, backend.held, backend.save_prompt())


def delivery(loop: asyncio.AbstractEventLoop, queue: asyncio.Queue[Any], mark: int) -> Callable[[Event], None]:
    """A `Job.deliver` that puts (mark, event) into a queue of the event loop."""

    def deliver(event: Event) -> None:
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(queue.put_nowait, (mark, event))

    return deliver
