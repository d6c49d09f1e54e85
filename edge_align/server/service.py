"""Between the protocols and the decoder: whose taste answers a request, its answers as they come, and what is kept."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from edge_align.config import SamplingConfig, ServerConfig
from edge_align.files import is_name
from edge_align.home import Home
from edge_align.profiles import ProfileStore
from edge_align.records import FinishReason, GenerationStats, TokenLogprob, user_prompt
from edge_align.server.answers import Answer
from edge_align.server.asks import Ask, SEEDS
from edge_align.server.decoder import Decoded, Decoder, delivery, Event, Job, Plan
from edge_align.server.engine import Engine
from edge_align.server.grammar import grammar_of
from edge_align.server.keys import Caller, Keys
from edge_align.server.learner import Learner
from edge_align.server.ledger import Ledger
from edge_align.server.metrics import Metrics
from edge_align.server.refusal import bad, Refusal

PROFILE_HEADER = "x-edge-align-profile"
TASK_HEADERS = ("x-edge-align-task", "x-openwebui-task")
FALLBACK_PROFILE = "default"  # whose verdicts are those on answers that no profile was meant for


@dataclass(frozen=True, slots=True)
class Chosen:
    """Whose taste a request gets. `name` is None for the base; `steered` False keeps the name for the feedback."""

    name: str | None
    strength: float = 1.0
    steered: bool = True


@dataclass(slots=True)
class Choice:
    """One answer as it grows."""

    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    names: dict[int, str] = field(default_factory=dict)
    finish: FinishReason | None = None
    stats: GenerationStats | None = None

    def feed(self, event: Decoded) -> None:
        self.text.append(event.chunk.text)
        self.logprobs += event.chunk.logprobs
        self.names |= event.names
        if event.chunk.finish_reason is not None:
            self.finish, self.stats = event.chunk.finish_reason, event.chunk.stats


class Running:
    """The answers of one request. `events` yields (choice, Decoded) in the order of decoding, until all have ended."""

    def __init__(self, service: Service, asks: Sequence[Ask], chosen: Chosen, caller: Caller, kind: str) -> None:
        self.id, self.created = f"{kind}-{secrets.token_hex(12)}", int(time.time())
        self.asks = [ask for ask in asks for _ in range(ask.n)]  # one per choice
        self.chosen, self.caller = chosen, caller
        self.choices = [Choice() for _ in self.asks]
        self.plans: dict[int, Plan] = {}
        self.jobs: list[Job] = []
        self.model = service.model_id
        self._service = service
        self._queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()

    async def begin(self) -> None:
        """Queue everything, and wait until the first answer begins. Raises its Refusal or EdgeAlignError."""
        loop, deadline = asyncio.get_running_loop(), time.monotonic() + self._service.config.wall_sec
        self.jobs = [
            Job(
                owner=self.caller.owner,
                lane=self.chosen.name or "",
                prepare=self._service.preparation(ask, self.chosen, offset=i),
                deliver=delivery(loop, self._queue, i),
                deadline=deadline,
            )
            for i, ask in enumerate(self.asks)
        ]
        self._service.decoder.submit(self.jobs)
        self._service.metrics.count("requests")
        await self._take(await self._queue.get(), [])  # a job's first event is its Plan or an error

    async def _take(self, item: tuple[int, Event], out: list[tuple[int, Decoded]]) -> None:
        index, event = item
        match event:
            case Plan():
                self.plans[index] = event
            case Decoded():
                self.choices[index].feed(event)
                out.append((index, event))
                if event.chunk.finish_reason is not None:
                    self._service.metrics.answered(event)
            case _:
                self.cancel()
                raise event

    async def events(self) -> AsyncIterator[tuple[int, Decoded]]:
        """Raises what an answer ended with; the others are then cancelled."""
        while any(choice.finish is None for choice in self.choices):
            out: list[tuple[int, Decoded]] = []
            await self._take(await self._queue.get(), out)
            for item in out:
                if all(choice.finish is not None for choice in self.choices):
                    await self._keep()  # before the end is told, so that a verdict can follow at once
                yield item

    async def finish(self) -> None:
        """Wait for the end."""
        async for _ in self.events():
            pass

    async def _keep(self) -> None:
        name = self.chosen.name or FALLBACK_PROFILE
        await self._service.ledger.keep(
            [
                Answer(self.id, i, self.caller.owner, name, ask.conversation, text, self._service.model_id)
                for i, ask in enumerate(self.asks)
                if not self.jobs[i].gone.is_set() and ask.judged(text := "".join(self.choices[i].text))
            ]
        )

    def cancel(self) -> None:
        """Nobody waits any more: decoding stops at the next token."""
        for job in self.jobs:
            job.gone.set()

    def finish_reason(self, index: int) -> str:
        """stop or length; an answer that was cut off by the clock has length."""
        return "stop" if self.choices[index].finish == "stop" else "length"

    @property
    def about(self) -> dict[str, Any]:
        """What edge-align says about an answer beside the protocol's own fields."""
        plan = self.plans[min(self.plans)]
        return {
            "profile": plan.profile,
            "version": plan.version,
            "strength": plan.strength,
            "seed": plan.sampling.seed - min(self.plans),
        }

    def usage(self) -> tuple[int, int, int]:
        """(prompt tokens, decoded tokens, prompt tokens from the cache)."""
        stats = [choice.stats for choice in self.choices if choice.stats is not None]
        prompts = {id(ask): len(self.plans[i].tokens) for i, ask in enumerate(self.asks) if i in self.plans}
        return (
            sum(prompts.values()),
            sum(one.completion_tokens for one in stats),
            min((one.cached_tokens for one in stats), default=0),
        )


class Service:
    """What the routes of every protocol share."""

    def __init__(
        self,
        *,
        config: ServerConfig,
        keys: Keys,
        home: Home,
        model_id: str,
        decoder: Decoder,
        ledger: Ledger,
        learner: Learner,
    ) -> None:
        self.config, self.keys, self.home, self.model_id = config, keys, home, model_id
        self.decoder, self.ledger, self.learner = decoder, ledger, learner
        self.store = ProfileStore(home)
        self.metrics = Metrics()
        self.default_profile, self.default_strength = config.profile, 1.0
        self.started = int(time.time())

    def profiles(self, caller: Caller) -> list[str]:
        """Names this caller may use, sorted."""
        known = {*self.store.names(), *self.keys.profiles, *([self.default_profile] if self.default_profile else [])}
        return sorted(name for name in known if caller.may_use(name))

    def check_profile(self, name: str, caller: Caller) -> str:
        """`name` itself. Raises Refusal: 400 for what is no name, 403 for another's, 404 for an unknown one."""
        if not is_name(name):
            raise bad("a profile is given by its name: letters, digits, '.', '_', '-'", param="steering.profile")
        if not caller.may_use(name):
            raise Refusal(403, "this API key may not use that profile; leave it out", code="profile_forbidden")
        if not (name in self.keys.profiles or name == self.default_profile or self.store.has(name)):
            raise Refusal(
                404, "there is no profile of that name; GET /v1/profiles lists yours", code="profile_not_found"
            )
        return name

    def choose(self, ask: Ask, headers: Mapping[str, str], caller: Caller) -> Chosen:
        """Body, then header, then the model's id, then the key, then the server's default."""
        base, _, suffix = (ask.model or self.model_id).partition("@")
        if base != self.model_id:
            raise Refusal(404, "no such model; GET /v1/models lists them", code="model_not_found", param="model")
        named = ask.wanted.profile or headers.get(PROFILE_HEADER) or suffix
        steered = ask.wanted.enabled and not any(headers.get(name) for name in TASK_HEADERS)
        if named:
            name: str | None = self.check_profile(named, caller)
        else:
            name = caller.profiles[0] if caller.bound else self.default_profile
        usual = self.default_strength if name == self.default_profile else 1.0
        return Chosen(name, usual if ask.wanted.strength is None else ask.wanted.strength, steered)

    async def running(self, asks: Sequence[Ask], headers: Mapping[str, str], caller: Caller, *, kind: str) -> Running:
        """What answers these asks, not begun yet. Raises Refusal or EdgeAlignError."""
        self.decoder.check()
        chosen = self.choose(asks[0], headers, caller)
        if asks[0].schema is not None:
            grammar = await asyncio.to_thread(grammar_of, asks[0].schema)
            asks = [replace(ask, sampling=replace(ask.sampling, grammar=grammar)) for ask in asks]
        return Running(self, asks, chosen, caller, kind)

    def preparation(self, ask: Ask, chosen: Chosen, *, offset: int) -> Any:
        """`Job.prepare` of one choice: choice i is drawn with the seed of choice 0, plus i."""
        sampling: SamplingConfig = replace(ask.sampling, seed=(ask.sampling.seed + offset) % SEEDS)

        def prepare(engine: Engine) -> Plan:
            backend = engine.backend
            if ask.prompt:
                tokens: Sequence[int] = backend.render(ask.prompt, tools=ask.tools)
            else:
                tokens = ask.tokens or backend.tokenize(ask.text or "")
            if chosen.name is None or not chosen.steered or chosen.strength == 0.0:
                return Plan(tokens, None, sampling)
            prompt = ask.conversation or user_prompt("")
            steering = engine.profiles.steering(chosen.name, prompt, chosen.strength)
            if steering is None:
                return Plan(tokens, None, sampling)
            return Plan(tokens, steering.vectors, sampling, chosen.name, steering.version, chosen.strength)

        return prepare
