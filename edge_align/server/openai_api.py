"""OpenAI's routes: models, chat completions, completions."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from edge_align.server import asks, openapi
from edge_align.server import openai_shape as shape
from edge_align.server.decoder import Decoded
from edge_align.server.openapi import takes
from edge_align.server.refusal import Refusal
from edge_align.server.service import Running, Service
from edge_align.server.tools import CallReader
from edge_align.server.transport import body_of, caller_of, Json, service_of, streamed, whole

router = APIRouter(prefix="/v1")

Shaped = Callable[[Running, int, Decoded], list[dict[str, Any]]]


@router.get("/models")
async def models(request: Request) -> Response:
    """The base, and the base with each profile that the caller may use. Answers while the model is loading, too."""
    service, caller = service_of(request), caller_of(request)
    ids = [service.model_id, *(f"{service.model_id}@{name}" for name in service.profiles(caller))]
    return Json({"object": "list", "data": [model(service, id) for id in ids]})


@router.get("/models/{id}")
async def one_model(request: Request, id: str) -> Response:
    service, caller = service_of(request), caller_of(request)
    base, _, suffix = id.partition("@")
    if base != service.model_id:
        raise Refusal(404, "no such model; GET /v1/models lists them", code="model_not_found", param="model")
    if suffix:
        service.check_profile(suffix, caller)
    return Json(model(service, id))


def model(service: Service, id: str) -> dict[str, Any]:
    return {"id": id, "object": "model", "created": service.started, "owned_by": "edge-align"}


@router.post("/chat/completions", **takes(openapi.CHAT, streams="text/event-stream"))
async def chat_completions(request: Request) -> Response:
    service = service_of(request)
    ask = asks.chat(body_of(request), service.config)
    running = await service.running([ask], request.headers, caller_of(request), kind="chatcmpl")
    if not ask.stream:
        return Json(shape.chat_response(await whole(request, running)))
    starts = [shape.chat_start(running, i) for i in range(ask.n)]
    readers = [CallReader(ask.tools, ask.forced) for _ in range(ask.n)]

    def shaped(running: Running, index: int, event: Decoded) -> list[dict[str, Any]]:
        return shape.chat_chunk(running, index, event, readers[index])

    parts = sse_parts(running, starts, shaped, "chat.completion.chunk")
    return await streamed(request, running, parts, media_type="text/event-stream", broken=shape.broken)


@router.post("/completions", **takes(openapi.COMPLETION, streams="text/event-stream"))
async def completions(request: Request) -> Response:
    service = service_of(request)
    found = asks.completions(body_of(request), service.config)
    running = await service.running(found, request.headers, caller_of(request), kind="cmpl")
    if not found[0].stream:
        return Json(shape.text_response(await whole(request, running)))
    parts = sse_parts(running, [], shape.text_chunk, "text_completion")
    return await streamed(request, running, parts, media_type="text/event-stream", broken=shape.broken)


async def sse_parts(running: Running, starts: list[dict[str, Any]], shaped: Shaped, kind: str) -> AsyncIterator[bytes]:
    """The events of a stream, the usage only where it was asked for."""
    for start in starts:
        yield shape.sse(start)
    async for index, event in running.events():
        for chunk in shaped(running, index, event):
            yield shape.sse(chunk)
    if running.asks[0].include_usage:
        yield shape.sse(shape.usage_chunk(running, kind))
    yield shape.DONE
