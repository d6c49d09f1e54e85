"""OpenAI's /v1/responses, stateless: nothing of a response is kept for a next one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from edge_align.config import ServerConfig
from edge_align.records import Tools
from edge_align.server import asks, fields, openapi
from edge_align.server import tools as tool_calls
from edge_align.server.asks import Ask
from edge_align.server.fields import Body
from edge_align.server.guard import dump_json
from edge_align.server.openapi import takes
from edge_align.server.refusal import bad, Refusal
from edge_align.server.service import Running
from edge_align.server.tools import Call, CallReader
from edge_align.server.transport import body_of, caller_of, Json, service_of, streamed, whole

router = APIRouter(prefix="/v1")


@router.post("/responses", **takes(openapi.RESPONSE, streams="text/event-stream"))
async def responses(request: Request) -> Response:
    service = service_of(request)
    ask = ask_of(body_of(request), service.config)
    running = await service.running([ask], request.headers, caller_of(request), kind="resp")
    if not ask.stream:
        return Json(document(await whole(request, running), said(running)))
    return await streamed(request, running, events(running), media_type="text/event-stream", broken=broken)


def ask_of(body: Body, config: ServerConfig) -> Ask:
    """A request as a chat. What needs a state is refused."""
    for name in ("previous_response_id", "conversation", "prompt"):
        if body.get(name) is not None:
            raise bad(f"{name} needs a server that keeps state; send the whole conversation as input", param=name)
    if body.get("background"):
        raise bad("background is not supported; leave it out", param="background")
    offer = {
        "tools": chat_tools(body, config),
        "tool_choice": chat_choice(body),
        "functions": body.get("functions"),
    }
    tools = tool_calls.offered(offer, config)
    given = body.get("input")
    if isinstance(given, str):
        turns: list[Any] = [{"role": "user", "content": given}]
    elif isinstance(given, list):
        turns = chat_turns(given)
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
    ask = asks.common(
        plain,
        config,
        asks.sampled(sampling, config),
        prompt=asks.messages({"messages": head + turns}, config),
        schema=asks.response_schema({"response_format": form}, config),
    )
    return asks.with_tools(ask, offer, tools, config)


def chat_tools(body: Body, config: ServerConfig) -> list[Any]:
    """The functions offered, as chat completions have them."""
    found = []
    for i, tool in enumerate(fields.items(body, "tools", most=config.tools) or []):
        if not isinstance(tool, dict) or tool.get("type") != "function":
            raise bad(f'tools[{i}] must be {{"type": "function", "name": ...}}; no others are served', param="tools")
        found.append({"type": "function", "function": {name: tool[name] for name in tool if name != "type"}})
    return found


def chat_choice(body: Body) -> Any:
    """`tool_choice`, as chat completions have it."""
    choice = body.get("tool_choice")
    return {"function": {"name": choice.get("name")}} if isinstance(choice, dict) else choice


def chat_turns(given: list[Any]) -> list[Any]:
    """Items of a conversation as messages; calls in a row are of one message, and thoughts are left out."""
    turns: list[Any] = []
    after_call = False
    for item in given:
        kind = item.get("type") if isinstance(item, dict) else None
        if kind == "reasoning":
            continue
        if kind == "function_call":
            call = {"function": {"name": item.get("name"), "arguments": item.get("arguments")}}
            if after_call:
                turns[-1]["tool_calls"].append(call)
            else:
                turns.append({"role": "assistant", "tool_calls": [call]})
        elif kind == "function_call_output":
            turns.append({"role": "tool", "content": item.get("output")})
        else:
            turns.append(item)
        after_call = kind == "function_call"
    return turns


@dataclass(frozen=True, slots=True)
class Said:
    """A whole answer: its text, and the calls in it."""

    text: str
    calls: tuple[Call, ...]

    def items(self, id: str) -> list[dict[str, Any]]:
        """The output of the response `id`; an answer of calls alone has no message."""
        shown = [message(id, self.text)] if self.text.strip() or not self.calls else []
        return shown + [called(id, i, call) for i, call in enumerate(self.calls)]


def said(running: Running) -> Said:
    ask = running.asks[0]
    text, calls = tool_calls.read("".join(running.choices[0].text), ask.tools, forced=ask.forced)
    return Said(text, tuple(calls))


def message(id: str, text: str | None) -> dict[str, Any]:
    """text: None before it is there."""
    return {
        "type": "message",
        "id": f"msg-{id}",
        "status": "in_progress" if text is None else "completed",
        "role": "assistant",
        "content": [] if text is None else [text_part(text)],
    }


def called(id: str, i: int, call: Call) -> dict[str, Any]:
    return {
        "type": "function_call",
        "id": f"fc-{id}-{i}",
        "call_id": call.id,
        "name": call.name,
        "arguments": call.arguments,
        "status": "completed",
    }


def text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def flat(tools: Tools) -> list[dict[str, Any]]:
    """The tools offered, in this protocol's form."""
    return [{"type": "function", "strict": None, **tool["function"]} for tool in tools]


def document(running: Running, answer: Said | None = None) -> dict[str, Any]:
    """The response object, without an answer before it is there; one cut off by a limit is "incomplete"."""
    ask, finished = running.asks[0], answer is not None
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
        "output": [] if answer is None else answer.items(running.id),
        "parallel_tool_calls": bool(ask.tools) and not ask.forced,
        "previous_response_id": None,
        "store": False,
        "temperature": ask.sampling.temperature,
        "tool_choice": "required" if ask.forced else "auto" if ask.tools else "none",
        "tools": flat(ask.tools),
        "top_p": ask.sampling.top_p,
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
    """The typed events in their order, numbered: the message's text as it comes, then every call as a whole."""
    number, id, ask = 0, running.id, running.asks[0]

    def event(kind: str, **fields: Any) -> bytes:
        nonlocal number
        number += 1
        value = {"type": kind, "sequence_number": number - 1, **fields}
        return f"event: {kind}\n".encode() + b"data: " + dump_json(value) + b"\n\n"

    def opened() -> bytes:
        added = event("response.output_item.added", output_index=0, item=message(id, None))
        return added + event("response.content_part.added", **place, part=text_part(""))

    place = {"item_id": f"msg-{id}", "output_index": 0, "content_index": 0}
    yield event("response.created", response=document(running))
    yield event("response.in_progress", response=document(running))
    reader, text, told = CallReader(ask.tools, ask.forced), "", 0
    async for _, decoded in running.events():
        text += reader.feed(decoded.chunk.text)
        if told < len(text) and (told or text.strip()):
            yield (b"" if told else opened()) + event(
                "response.output_text.delta", **place, delta=text[told:], logprobs=[]
            )
            told = len(text)
    text += reader.finish()
    answer = Said(text, tuple(reader.calls))
    for index, item in enumerate(answer.items(id)):
        if item["type"] == "message":
            yield b"" if told else opened()
            if told < len(text):
                yield event("response.output_text.delta", **place, delta=text[told:], logprobs=[])
            yield event("response.output_text.done", **place, text=text, logprobs=[])
            yield event("response.content_part.done", **place, part=text_part(text))
        else:
            of = {"item_id": item["id"], "output_index": index}
            empty = item | {"arguments": "", "status": "in_progress"}
            yield event("response.output_item.added", output_index=index, item=empty)
            yield event("response.function_call_arguments.delta", **of, delta=item["arguments"])
            yield event("response.function_call_arguments.done", **of, name=item["name"], arguments=item["arguments"])
        yield event("response.output_item.done", output_index=index, item=item)
    whole = document(running, answer)
    yield event("response.incomplete" if whole["status"] == "incomplete" else "response.completed", response=whole)


def broken(refusal: Refusal) -> bytes:
    value = {"type": "error", "code": refusal.code, "message": refusal.message, "param": None, "sequence_number": 0}
    return b"event: error\ndata: " + dump_json(value) + b"\n\n"
