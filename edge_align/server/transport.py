"""HTTP answers of the routes: JSON at once, or a stream that ends when its client does."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from edge_align.server.fields import Body
from edge_align.server.guard import dump_json
from edge_align.server.keys import Caller
from edge_align.server.refusal import from_error
from edge_align.server.service import Running, Service


def service_of(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def caller_of(request: Request) -> Caller:
    caller: Caller = request.state.caller
    return caller


def body_of(request: Request) -> Body:
    """The JSON object that the guard has read."""
    body: Body = request.state.body
    return body


class Json(Response):
    """A JSON answer."""

    media_type = "application/json"

    def __init__(self, content: Any, status_code: int = 200, headers: dict[str, str] | None = None) -> None:
        more = {"x-request-id": f"req-{secrets.token_hex(8)}", **(headers or {})}
        super().__init__(content, status_code, headers=more)

    def render(self, content: Any) -> bytes:
        return dump_json(content)


class Attended:
    """Watches the connection of a request: when the client goes away, its answers are cancelled."""

    def __init__(self, request: Request, running: Running) -> None:
        self.running = running
        self._receive = request.receive
        self._task = asyncio.create_task(self._until_gone())

    async def _until_gone(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.running.cancel()

    async def close(self) -> None:
        """Stop watching; what is not finished by now is cancelled."""
        self.running.cancel()
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task


async def whole(request: Request, running: Running) -> Running:
    """All answers of a request, finished. Raises Refusal or EdgeAlignError."""
    watch = Attended(request, running)
    try:
        await running.begin()
        await running.finish()
    finally:
        await watch.close()
    return running


async def streamed(
    request: Request, running: Running, parts: AsyncIterator[bytes], *, media_type: str, broken: Any
) -> Response:
    """An answer in parts, once the first one can begin. `broken(error)`: the part that ends a failed stream."""
    watch = Attended(request, running)
    try:
        await running.begin()
    except BaseException:
        await watch.close()
        raise
    return Stream(watch, parts, media_type=media_type, broken=broken)


class Stream(Response):
    """Sends parts as they come; cancels the answers when the client goes, or when it cannot go on."""

    def __init__(self, watch: Attended, parts: AsyncIterator[bytes], *, media_type: str, broken: Any) -> None:
        super().__init__(media_type=media_type)
        self._watch, self._parts, self._broken = watch, parts, broken

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        headers = [(name, value) for name, value in self.raw_headers if name != b"content-length"]
        headers += [(b"x-accel-buffering", b"no"), (b"x-request-id", f"req-{secrets.token_hex(8)}".encode())]
        try:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            try:
                async for part in self._parts:
                    await send({"type": "http.response.body", "body": part, "more_body": True})
            except Exception as error:
                part = self._broken(from_error(error))
                await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            await self._watch.close()
