"""What the server says when it refuses: one sentence with a remedy, in the shape of the caller's protocol.

A sentence never holds a path, another person's profile or a text of a prompt. What may not be told, because the error
is about files of this machine, goes to the log instead.
"""

from __future__ import annotations

import logging
from typing import Any

from edge_align.errors import BackendUnavailable, ContextOverflow, EdgeAlignError, InputError

log = logging.getLogger("edge_align.server")

_TYPES = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
_TYPES |= dict.fromkeys((405, 408, 409, 413, 415, 421, 422), "invalid_request_error")
_TYPES |= {429: "rate_limit_error", 503: "unavailable_error"}


class Refusal(Exception):
    """An answer other than success. `code` is for programs, `param` the field that is wrong."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers: dict[str, str] = {} if retry_after is None else {"retry-after": str(retry_after)}

    def body(self, *, ollama: bool) -> dict[str, Any]:
        """The JSON body: Ollama's `{"error": text}` or OpenAI's error object."""
        if ollama:
            return {"error": self.message}
        kind = _TYPES.get(self.status, "api_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def bad(message: str, *, param: str | None = None, code: str | None = None) -> Refusal:
    """A 400."""
    return Refusal(400, message, param=param, code=code)


def busy() -> Refusal:
    return Refusal(429, "the queue is full; try again in a few seconds", code="queue_full", retry_after=2)


def loading() -> Refusal:
    return Refusal(503, "the model is loading; try again in a second", code="loading", retry_after=1)


def from_error(error: Exception) -> Refusal:
    """The refusal for one of our errors; anything about this machine's files is logged and not told."""
    match error:
        case Refusal():
            return error
        case ContextOverflow():
            return bad(str(error), param="messages", code="context_length_exceeded")
        case InputError() | BackendUnavailable():
            return bad(str(error))
        case EdgeAlignError():
            log.error("%s: %s", type(error).__name__, error)
            return Refusal(500, "the server could not do this; its log says why", code=type(error).__name__)
    log.error("unexpected %s", type(error).__name__)  # its text may hold a prompt
    return Refusal(500, "an unexpected error; the server's log names it", code="internal")


def is_ollama(path: str) -> bool:
    return path.startswith("/api/")
