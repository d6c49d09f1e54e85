"""OpenAI's /v1/responses, stateless: nothing of a response is kept for a next one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from edge_align.config import ServerConfig
from edge_align.server import asks, fields, openapi
from edge_align.server.asks import Ask
from edge_align.server.fields import Body
from edge_align.server.guard import dump_json
from edge_align.server.openapi import takes
from edge_align.server.refusal import bad, Refusal
from edge_align.server.service import Running
from edge_align.server.transport import body_of, caller_of, Json, service_of, streamed, whole

router = APIRouter(prefix="/v1")


@router.post("/responses", **takes(openapi.RESPONSE, streams="text/event-stream"))
async def responses(request: Request) -> Response:
    service = service_of(request)
    ask = ask_of(body_of(request), service.config)
    running = await service.running([ask], request.headers, caller_of(request), kind="resp")
    if not ask.stream:
        return Json(document(await whole(request, running), finished=True))
    return await streamed(request, running, events(running), media_type="text/event-stream", broken=broken)


def ask_of(body: Body, config: ServerConfig) -> Ask:
    """A request as a chat. What needs a state, or tools, is refused."""
    for name in ("previous_response_id", "conversation", "prompt"):
        if body.get(name) is not None:
            raise bad(f"{name} needs a server that keeps state; send the whole conversation as input", param=name)
    if body.get("background"):
        raise bad("background is not supported; leave it out", param="background")
    asks.refuse_tools(body)
    given = body.get("input")
    if isinstance(given, str):
        turns: list[Any] = [{"role": "user", "content": given}]
    elif isinstance(given, list):
        turns = [turn for turn in given if not (isinstance(turn, dict) and turn.get("type") == "reasoning")]
    else:
        raise bad("input is missing; send text or a list of messages", param="input")
    instructions = fields.text(body, "instructions")
    head = [{"role": "system", "content": instructions}] if instructions else []
    form = (fields.table(body, "text") or {}).get("format")
    if isinstance(form, dict) and form.get("type") == "json_schema":
        form = {"type": "json_schema", "json_schema": {"schema": form.get("schema")}}
    plain = {name: value for name, value in body.items() if name in ("model", "steering", "stream")}
    sampling = {name: body.get(name) for name in ("temperature", "top_p", "seed")}
    sampling["max_tokens"] = body.get("max_output_tokens")
    return asks.common(
        plain,
        config,
        asks.sampled(sampling, config),
        prompt=asks.messages({"messages": head + turns}, config),
        schema=asks.response_schema({"response_format": form}, config),
    )


def message(running: Running, *, finished: bool) -> dict[str, Any]:
    content = [text_part("".join(running.choices[0].text))] if finished else []
    return {
        "type": "message",
        "id": f"msg-{running.id}",
        "status": "completed" if finished else "in_progress",
        "role": "assistant",
        "content": content,
    }


def text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def document(running: Running, *, finished: bool) -> dict[str, Any]:
    """The response object; an answer cut off by a limit is "incomplete"."""
    cut = finished and running.finish_reason(0) == "length"
    shown: dict[str, Any] = {
        "id": running.id,
        "object": "response",
        "created_at": running.created,
        "status": "incomplete" if cut else "completed" if finished else "in_progress",
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "error": None,
        "instructions": None,
        "metadata": {},
        "model": running.model,
        "output": [message(running, finished=True)] if finished else [],
        "parallel_tool_calls": False,
        "previous_response_id": None,
        "store": False,
        "temperature": running.asks[0].sampling.temperature,
        "tool_choice": "none",
        "tools": [],
        "top_p": running.asks[0].sampling.top_p,
        "usage": None,
    }
    if finished:
        prompt, decoded, cached = running.usage()
        shown["edge_align"] = running.about
        shown["usage"] = {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": cached},
            "output_tokens": decoded,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": prompt + decoded,
        }
    return shown


async def events(running: Running) -> AsyncIterator[bytes]:
    """The typed events of one message of text, in their order, numbered."""
    number = 0

    def event(kind: str, **fields: Any) -> bytes:
        nonlocal number
        number += 1
        value = {"type": kind, "sequence_number": number - 1, **fields}
        return f"event: {kind}\n".encode() + b"data: " + dump_json(value) + b"\n\n"

    place = {"item_id": f"msg-{running.id}", "output_index": 0, "content_index": 0}
    yield event("response.created", response=document(running, finished=False))
    yield event("response.in_progress", response=document(running, finished=False))
    yield event("response.output_item.added", output_index=0, item=message(running, finished=False))
    yield event("response.content_part.added", **place, part=text_part(""))
    async for _, decoded in running.events():
        if decoded.chunk.text:
            yield event("response.output_text.delta", **place, delta=decoded.chunk.text, logprobs=[])
    text = "".join(running.choices[0].text)
    yield event("response.output_text.done", **place, text=text, logprobs=[])
    yield event("response.content_part.done", **place, part=text_part(text))
    yield event("response.output_item.done", output_index=0, item=message(running, finished=True))
    whole = document(running, finished=True)
    yield event("response.incomplete" if whole["status"] == "incomplete" else "response.completed", response=whole)


def broken(refusal: Refusal) -> bytes:
    value = {"type": "error", "code": refusal.code, "message": refusal.message, "param": None, "sequence_number": 0}
    return b"event: error\ndata: " + dump_json(value) + b"\n\n"
