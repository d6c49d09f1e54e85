"""A server on a port of its own, in this process, and a client that speaks HTTP by hand."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import uvicorn

from edge_align.config import RuntimeConfig, ServerConfig
from edge_align.home import Home
from edge_align.records import Prompt, SteeringVectors
from edge_align.runtime.fake import FakeBackend
from edge_align.server.app import create_app
from edge_align.server.engine import Engine, Steering
from edge_align.server.keys import Caller, Keys
from edge_align.server.listen import listen, settings

MODEL = "smollm2-135m-instruct"
QUESTION = [{"role": "user", "content": "How do boats float?"}]
TOKEN_SEC = 0.004  # of the slow fake


class SlowBackend(FakeBackend):
    """The fake, at the speed of a real base, and never at the end of an answer."""

    decoded = 0

    def _logits(self, context: list[int]) -> np.ndarray:
        time.sleep(TOKEN_SEC)
        SlowBackend.decoded += 1
        logits = super()._logits(context).copy()
        logits[257] = -100.0
        return logits

    def fork(self) -> SlowBackend:
        return SlowBackend(config=self._config)


class FixedProfiles:
    """Profiles "ann", "bob" and "cat" of the fake, each with vectors of its own."""

    def __init__(self, names: tuple[str, ...] = ("ann", "bob", "cat")) -> None:
        self.versions = dict.fromkeys(names, 1)

    def vectors(self, name: str, version: int) -> SteeringVectors:
        seed = sum(map(ord, name)) + 1000 * version
        array = np.random.default_rng(seed).normal(size=(4, 16)).astype(np.float32) * 8
        array[0] = 0
        return SteeringVectors(array)

    def steering(self, name: str, prompt: Prompt, strength: float) -> Steering | None:
        if name not in self.versions:
            return None
        return Steering(self.versions[name], self.vectors(name, self.versions[name]).scaled(strength))


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    data: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.data)

    @property
    def events(self) -> list[Any]:
        """The documents of a stream of server-sent events, [DONE] checked and left out."""
        lines = [line[6:] for line in self.data.decode().split("\n\n") if line.startswith("data: ")]
        assert lines[-1] == "[DONE]"
        return [json.loads(line) for line in lines[:-1]]


@dataclass
class Live:
    """A running server."""

    port: int
    service: Any
    engine: Engine | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Reply:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            data = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
            kind = {} if body is None else {"Content-Type": "application/json"}
            connection.request(method, path, data, {**kind, **(headers or {})})
            reply = connection.getresponse()
            return Reply(reply.status, {k.lower(): v for k, v in reply.getheaders()}, reply.read())
        finally:
            connection.close()

    def chat(self, content: str = "How do boats float?", headers: dict[str, str] | None = None, **more: Any) -> Reply:
        body = {"model": MODEL, "messages": [{"role": "user", "content": content}], "max_tokens": 24, "seed": 1, **more}
        return self.ask("POST", "/v1/chat/completions", body, headers)

    def text(self, content: str = "How do boats float?", **more: Any) -> str:
        reply = self.chat(content, **more)
        assert reply.status == 200, reply.data
        return str(reply.json["choices"][0]["message"]["content"])


def fake_engine(backend: FakeBackend | None = None, profiles: Any = None) -> Callable[[], Engine]:
    engine = Engine(
        backend or FakeBackend(config=RuntimeConfig(n_ctx=2048)), profiles or FixedProfiles(), embed=embedded
    )
    return lambda: engine


def embedded(tokens: Sequence[int]) -> np.ndarray:
    """An embedding that counts on one hand: (how many, their sum, the first, the last) / 1000."""
    return np.array([len(tokens), sum(tokens), tokens[0], tokens[-1]], np.float32) / 1000


def keys_of(**known: tuple[str, ...]) -> Keys:
    """Keys by name: the key of "ann" is ann-ann-ann-ann-ann."""
    return Keys(tuple((key_of(name).encode(), Caller(f"owner-{name}", profiles)) for name, profiles in known.items()))


def key_of(name: str) -> str:
    return "-".join([name] * 5)


def bearer(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key_of(name)}"}


@contextmanager
def serving(
    home: Home,
    *,
    open_engine: Any = None,
    config: ServerConfig | None = None,
    wait: bool = True,
    send_buffer: int | None = None,
    **more: Any,
) -> Iterator[Live]:
    """Serve until the block ends; `wait` for the engine first. `send_buffer`: bytes the kernel keeps of an answer."""
    config = config or ServerConfig()
    app = create_app(home=home, config=config, open_engine=open_engine, **more)
    server = uvicorn.Server(settings(app, config))
    listener = listen("127.0.0.1", 0)
    if send_buffer is not None:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)  # accepted sockets inherit it
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])), daemon=True)
    thread.start()
    try:
        live = Live(listener.getsockname()[1], app._app.state.service)  # type: ignore[attr-defined]
        until(lambda: server.started)
        if wait:
            until(lambda: live.service.decoder.state != "loading")
            assert live.service.decoder.state == "ready", live.service.decoder.failure
        yield live
    finally:
        server.should_exit = True
        thread.join(30)
        listener.close()
    assert not thread.is_alive(), "the server does not end"


def until(true: Callable[[], bool], *, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.005)
