"""Who is answered when: running answers go on while a long prompt is read."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from live_server import fake_engine, Reply, serving, SlowBackend, until

from edge_align.config import RuntimeConfig, SamplingConfig, ServerConfig
from edge_align.home import Home
from edge_align.records import GenerationChunk, SteeringVectors

PARTS = 6
LONG = 1000  # tokens; a prompt of more is the long one


class PartsBackend(SlowBackend):
    """The slow fake, which reads a long prompt in parts; `done` lists what it did, whichever fork of it.

    A short answer waits for `gate` after its first token.
    """

    done: list[str] = []
    gate = threading.Event()

    def fork(self) -> PartsBackend:
        return PartsBackend(config=self._config)

    def generate(
        self,
        prompt: Sequence[int],
        *,
        vectors: SteeringVectors | None,
        sampling: SamplingConfig,
        cancelled: Callable[[], bool] | None = None,
    ) -> Iterator[GenerationChunk]:
        long = len(prompt) > LONG
        for _ in range(PARTS if long else 0):
            self.done.append("part")
            yield GenerationChunk("")
        for chunk in super().generate(prompt, vectors=vectors, sampling=sampling, cancelled=cancelled):
            self.done += ["long" if long else "short"] * len(chunk.tokens)
            assert long or self.gate.wait(30)
            yield chunk


def test_running_answers_go_on_while_a_long_prompt_is_read(tmp_path: Path) -> None:
    PartsBackend.done.clear()
    PartsBackend.gate.clear()
    engine = fake_engine(PartsBackend(config=RuntimeConfig(n_ctx=2048)))
    short: list[str] = []
    long: list[Reply] = []
    with serving(Home(tmp_path / "home"), open_engine=engine, config=ServerConfig(slots=2, slice_tokens=4)) as live:
        running = threading.Thread(target=lambda: short.append(live.text(max_tokens=60)))
        running.start()
        until(lambda: PartsBackend.done == ["short"])
        later = threading.Thread(target=lambda: long.append(live.chat("x" * LONG, max_tokens=8, stream=True)))
        later.start()
        until(lambda: live.service.decoder.load == (1, 1))
        PartsBackend.gate.set()
        running.join()
        later.join()
        assert short == [live.text(max_tokens=60)]
    deltas = [choice["delta"] for event in long[0].events for choice in event["choices"]]
    assert all(delta["content"] for delta in deltas[1:-1])  # of the parts of the prompt nothing is told
    turns = ["short", *(["part"] + ["short"] * 4) * PARTS, *["long"] * 4, *["short"] * 8, *["long"] * 4]
    assert PartsBackend.done[: len(turns)] == turns
