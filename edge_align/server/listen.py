"""The socket, the connections and the log of the server."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
from typing import ClassVar

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from edge_align.config import ServerConfig
from edge_align.server.guard import App, dump_json, Receive, respond, Scope, Send
from edge_align.server.refusal import bad, Refusal

HEAD_BYTES = 64 << 10  # of a request line and its headers


def listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        if os.name == "posix":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(512)
    except BaseException:
        listener.close()
        raise
    return listener


def settings(app: App, config: ServerConfig) -> uvicorn.Config:
    """How uvicorn serves `app`."""

    class Limited(Connection):
        limits = config

    return uvicorn.Config(
        app,
        http=Limited,
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        h11_max_incomplete_event_size=HEAD_BYTES,
        timeout_graceful_shutdown=5,
    )


class Connection(H11Protocol):
    """uvicorn's HTTP/1.1, with an end to waiting for a client that sends or reads a byte now and then, or none.

    uvicorn ends connections that are silent between two requests. Until the head of a request is complete nothing of
    ours has seen it, and once its answer is sent nothing reads the rest of it: those times are bounded here, the
    arrival of the body by the guard. What uvicorn refuses itself is refused in JSON.
    """

    limits: ClassVar[ServerConfig]
    _head_timer: asyncio.TimerHandle | None = None
    _read_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            self.app = crowded
        self._expect()

    def connection_lost(self, exc: Exception | None) -> None:
        stop(self._head_timer)
        self._head_timer = None
        stop(self._read_timer)
        self._read_timer = None
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._expect()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._expect()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._read_timer is None:
            self._read_timer = self.loop.call_later(self.limits.read_sec, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        stop(self._read_timer)
        self._read_timer = None

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002
        self._refuse(bad("this is not HTTP/1.1, or its headers are too long; use an HTTP client"))

    def _expect(self) -> None:
        """Start the timer where the next request is waited for; stop it where one is being answered."""
        if self.cycle is not None and not self.cycle.response_complete:
            stop(self._head_timer)
            self._head_timer = None
        elif self._head_timer is None and not self.transport.is_closing():
            self._head_timer = self.loop.call_later(self.limits.head_sec, self._too_slow)

    def _too_slow(self) -> None:
        self._head_timer = None
        seconds = f"{self.limits.head_sec:g} seconds"
        self._refuse(Refusal(408, f"the headers of the request did not arrive within {seconds}; send them at once"))

    def _refuse(self, refusal: Refusal) -> None:
        """Answer what is not a request yet, and close; without an answer where another one has begun."""
        if self.transport.is_closing() or self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.abort()
            return
        data = dump_json(refusal.body(ollama=False))
        lines = {"content-type": "application/json", "content-length": str(len(data)), "connection": "close"}
        head = h11.Response(status_code=refusal.status, headers=[*lines.items()])
        for event in (head, h11.Data(data=data), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


def stop(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


async def crowded(scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG001
    """The application of one connection too many."""
    refusal = Refusal(503, "too many connections are open; close some and try again", code="crowded", retry_after=1)
    await respond(send, refusal.status, refusal.body(ollama=False), {"connection": "close", **refusal.headers})


def log_to_stderr() -> None:
    """Errors on stderr, and with EDGE_ALIGN_LOG=info a line per request: method, route, status, time; never a text."""
    level = logging.INFO if os.environ.get("EDGE_ALIGN_LOG", "").lower() == "info" else logging.WARNING
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("edge_align.server")
    logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False
    logging.getLogger("uvicorn.error").addHandler(logging.NullHandler())
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # its tracebacks may hold texts; the guard logs
