"""The door, in front of every route: who may call, from where, with what; and nobody's text in a log.

Written against the ASGI protocol itself, so that a body is counted while it streams in and nothing runs before it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from edge_align.config import ServerConfig
from edge_align.server.keys import Caller, Keys
from edge_align.server.refusal import bad, from_error, is_ollama, Refusal

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

log = logging.getLogger("edge_align.server")

OPEN_PATHS = frozenset({"/", "/health", "/api/version"})  # liveness; they tell nothing and need no key
LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "[::1]"})
APP_ORIGINS = re.compile(r"(app|tauri|vscode-webview|vscode-file|capacitor|file)://[^/]*")
LOCAL_ORIGIN = re.compile(r"https?://(localhost|127\.0\.0\.1|\[::1\]|tauri\.localhost)(:[0-9]{1,5})?")
ROUTE = re.compile(r"/(?:api|v1)(?:/[a-z_]{1,20}){0,2}|/[a-z]{0,12}")  # what of a path may stand in a log
_BRACKETS = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)
DRAIN_SEC, DRAIN_BODIES = 1.0, 8  # how long, and how many times the largest body, a refused body is read and dropped
SECURITY_HEADERS = [(b"x-content-type-options", b"nosniff"), (b"cache-control", b"no-store")]


class Guard:
    """An ASGI application around another one."""

    def __init__(self, app: App, *, config: ServerConfig, keys: Keys) -> None:
        self._app, self._config, self._keys = app, config, keys
        self._hosts = LOCAL_HOSTS | {host.lower() for host in config.hosts}
        if config.host not in ("0.0.0.0", "::", ""):
            self._hosts |= {f"[{config.host}]" if ":" in config.host else config.host.lower()}
        self._origins = frozenset(origin.rstrip("/").lower() for origin in config.origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status, heard, ended = time.perf_counter(), 0, False, False
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        path, origin = scope["path"], headers.get("origin")
        allowed = origin is not None and self._origin_allowed(origin)

        async def answer(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                extra = [*SECURITY_HEADERS, *(cors(headers, origin or "") if allowed else [])]
                message["headers"] = [*message.get("headers", []), *extra]
            await send(message)

        async def hear() -> MutableMapping[str, Any]:
            nonlocal heard, ended
            message = await receive()
            heard, ended = True, message["type"] == "http.disconnect" or not message.get("more_body")
            return message

        try:
            self._check_source(headers, origin, allowed)
            if scope["method"] == "OPTIONS":
                await answer({"type": "http.response.start", "status": 204, "headers": [(b"allow", METHODS)]})
                await answer({"type": "http.response.body", "body": b""})
            else:
                state = scope.setdefault("state", {})
                state["caller"] = self._authenticate(path, headers)
                state["body"] = await self._body(scope, headers, hear)
                await self._app(scope, receive, answer)
        except Exception as error:
            refusal = from_error(error)
            if status:  # too late for another status: the connection ends in the middle
                raise _Broken from None
            if not ended and (heard or "expect" not in headers):  # who asks first sends no body after a refusal
                await self._drain(hear)
            await respond(answer, refusal.status, refusal.body(ollama=is_ollama(path)), refusal.headers)
        finally:
            route = match[0] if (match := ROUTE.match(path)) else "?"
            log.info("%s %s %d %.0f ms", scope["method"][:8], route, status, 1e3 * (time.perf_counter() - started))

    async def _drain(self, hear: Receive) -> None:
        """Read on for a moment, and drop it: closing on unread data resets the connection, and the answer with it."""
        left = DRAIN_BODIES * self._config.body_bytes
        try:
            async with asyncio.timeout(DRAIN_SEC):
                while left > 0:
                    message = await hear()
                    left -= len(message.get("body", b""))
                    if message["type"] == "http.disconnect" or not message.get("more_body"):
                        return
        except TimeoutError:
            pass

    def _check_source(self, headers: dict[str, str], origin: str | None, allowed: bool) -> None:
        """The names by which web pages reach a server that is not theirs: a foreign Host, a foreign Origin."""
        host = re.sub(r":[0-9]{1,5}\Z", "", headers.get("host", "").lower())
        if host not in self._hosts:
            raise Refusal(403, "this host name is not served; use 127.0.0.1 or add the name with --host-name")
        if origin is not None and not allowed:
            raise Refusal(403, "this origin may not call; add it with --origin")

    def _origin_allowed(self, origin: str) -> bool:
        origin = origin.lower()
        if origin in self._origins:
            return True
        return origin != "null" and bool(LOCAL_ORIGIN.fullmatch(origin) or APP_ORIGINS.fullmatch(origin))

    def _authenticate(self, path: str, headers: dict[str, str]) -> Caller:
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key")
        caller = self._keys.caller(given)
        if caller is None and path in OPEN_PATHS:
            return Caller(owner="nobody")
        if caller is None:
            raise Refusal(401, "an API key is needed; send it as 'Authorization: Bearer KEY'", code="invalid_api_key")
        return caller

    async def _body(self, scope: Scope, headers: dict[str, str], receive: Receive) -> dict[str, Any]:
        """The JSON object of a request that has a body."""
        if scope["method"] not in ("POST", "PUT", "PATCH", "DELETE"):
            return {}
        data = await self._read(headers, receive)
        kind = headers.get("content-type", "").split(";")[0].strip().lower()
        if kind != "application/json" and (data or scope["method"] != "DELETE"):
            raise Refusal(415, "the body must be JSON; send the header 'Content-Type: application/json'")
        return parse_json(data, nesting=self._config.nesting) if data else {}

    async def _read(self, headers: dict[str, str], receive: Receive) -> bytes:
        limit = self._config.body_bytes
        too_large = Refusal(413, f"the body is larger than {limit} bytes; send less at once")
        declared = headers.get("content-length", "0")
        if declared.isdigit() and (len(declared) > 12 or int(declared) > limit):
            raise too_large
        data = bytearray()
        try:
            async with asyncio.timeout(self._config.body_sec):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise bad("the connection ended before the body did")
                    data += message.get("body", b"")
                    if len(data) > limit:
                        raise too_large
                    if not message.get("more_body"):
                        return bytes(data)
        except TimeoutError:
            raise Refusal(408, f"the body did not arrive within {self._config.body_sec:g} seconds") from None


METHODS = b"GET, HEAD, POST, DELETE, OPTIONS"


class _Broken(Exception):
    """Ends a connection whose answer cannot be completed; the cause is in the log."""


def cors(headers: dict[str, str], origin: str) -> list[tuple[bytes, bytes]]:
    """What a browser needs to hear for an allowed origin: that origin, the headers it asked for, no credentials."""
    found = [
        (b"access-control-allow-origin", origin.encode("latin-1")),
        (b"vary", b"Origin"),
        (b"access-control-expose-headers", b"x-request-id, retry-after"),
    ]
    if "access-control-request-method" in headers:
        asked = headers.get("access-control-request-headers", "")
        wanted = asked if re.fullmatch(r"[A-Za-z0-9_, -]{0,2000}", asked) else ""
        found += [
            (b"access-control-allow-methods", METHODS),
            (b"access-control-allow-headers", wanted.encode()),
            (b"access-control-max-age", b"600"),
        ]
    return found


def parse_json(data: bytes, *, nesting: int) -> dict[str, Any]:
    """A JSON object of finite numbers, nested at most so deep. Raises Refusal 400."""
    depth = 0
    for token in _BRACKETS.finditer(data):
        if token[0] in (b"[", b"{"):
            depth += 1
            if depth > nesting:
                raise bad(f"the JSON is nested more than {nesting} levels deep")
        elif token[0] in (b"]", b"}"):
            depth -= 1
    try:
        value = json.loads(data, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):  # also UnicodeDecodeError, and integers of thousands of digits
        raise bad("the body is not JSON; check quotes, commas and brackets") from None
    if not isinstance(value, dict):
        raise bad("the body must be a JSON object")
    return value


def _refuse_constant(name: str) -> float:
    raise ValueError(name)


def dump_json(value: Any) -> bytes:
    """JSON in UTF-8; a lone surrogate, which UTF-8 cannot hold, stays the escape it came as."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.encode("utf-8", "backslashreplace")


async def respond(send: Send, status: int, body: dict[str, Any], headers: dict[str, str]) -> None:
    """A JSON answer, written by hand because no framework has seen the request."""
    data = dump_json(body)
    lines = {"content-type": "application/json", "content-length": str(len(data)), **headers}
    if status in (408, 413):
        lines["connection"] = "close"  # the rest of the body is not read
    raw = [(name.encode(), value.encode()) for name, value in lines.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": data})
