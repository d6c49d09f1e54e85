"""Ollama's routes: many desktop programs speak only that. Streams are lines of JSON, and streaming is the default."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from datetime import datetime, UTC
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import PlainTextResponse, Response

from edge_align.config import ServerConfig
from edge_align.records import user_prompt
from edge_align.server import asks, fields, openapi
from edge_align.server import tools as tool_calls
from edge_align.server.asks import Ask
from edge_align.server.embeddings import embed, texts_of
from edge_align.server.fields import Body
from edge_align.server.guard import dump_json
from edge_align.server.openapi import answers, takes
from edge_align.server.refusal import bad, Refusal
from edge_align.server.service import Running, Service
from edge_align.server.tools import Call, CallReader
from edge_align.server.transport import body_of, caller_of, Json, service_of, streamed, whole

router = APIRouter()

SPOKEN = "0.13.3"  # the version of Ollama whose API this is; programs ask for it
OPTIONS = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "seed": "seed", "stop": "stop"}
OPTIONS |= {"presence_penalty": "presence_penalty", "frequency_penalty": "frequency_penalty"}


@router.get("/", **answers("text/plain"))
@router.head("/", include_in_schema=False)
async def alive() -> Response:
    return PlainTextResponse("Ollama is running")


@router.get("/api/version")
async def version() -> Response:
    return Json({"version": SPOKEN})


@router.get("/api/tags")
async def tags(request: Request) -> Response:
    service, caller = service_of(request), caller_of(request)
    names = [service.model_id, *(f"{service.model_id}@{name}" for name in service.profiles(caller))]
    return Json({"models": [described(service, name) for name in names]})


@router.get("/api/ps")
async def ps(request: Request) -> Response:
    """The loaded model, which stays loaded."""
    service = service_of(request)
    if service.decoder.state != "ready":
        return Json({"models": []})
    entry = described(service, service.model_id) | {"expires_at": "9999-12-31T23:59:59Z", "size_vram": 0}
    return Json({"models": [entry]})


@router.post("/api/show", **takes(openapi.OLLAMA_SHOW))
async def show(request: Request) -> Response:
    service, body = service_of(request), body_of(request)
    name = model_of(body) or service.model_id
    service.choose(Ask(model=name, sampling=asks.sampled({}, service.config)), {}, caller_of(request))
    info, tools = await service.decoder.call(lambda engine: (engine.backend.info, engine.backend.takes_tools))
    return Json(
        {
            "details": details(service),
            "model_info": {
                "general.architecture": info.architecture,
                f"{info.architecture}.block_count": info.n_layer,
                f"{info.architecture}.embedding_length": info.d_model,
                f"{info.architecture}.context_length": info.n_ctx,
            },
            "capabilities": ["completion", *(["tools"] if tools else [])],
            "modelfile": "",
            "parameters": "",
            "template": "",
        }
    )


def described(service: Service, name: str) -> dict[str, Any]:
    digest = name.encode().hex().ljust(64, "0")[:64]
    started = datetime.fromtimestamp(service.started, UTC).isoformat()
    return {
        "name": f"{name}:latest",
        "model": f"{name}:latest",
        "modified_at": started,
        "size": 0,
        "digest": digest,
        "details": details(service),
    }


def details(service: Service) -> dict[str, Any]:
    return {
        "parent_model": "",
        "format": "gguf",
        "family": service.model_id,
        "families": [service.model_id],
        "parameter_size": "",
        "quantization_level": "",
    }


def model_of(body: Body) -> str | None:
    """The model's name; Ollama's default tag is no part of ours."""
    name = fields.text(body, "model", most=256) or fields.text(body, "name", most=256)
    return None if name is None else name.removesuffix(":latest")


@router.post("/api/chat", **takes(openapi.OLLAMA_CHAT, streams="application/x-ndjson"))
async def chat(request: Request) -> Response:
    service, body = service_of(request), body_of(request)
    tools = tool_calls.offered(body, service.config)
    if not body.get("messages"):
        return await loaded(request, service, {"message": {"role": "assistant", "content": ""}})
    ask = ask_of(body, service.config, prompt=asks.messages(body, service.config))
    return await answer(request, replace(ask, tools=tools), "message")


@router.post("/api/generate", **takes(openapi.OLLAMA_GENERATE, streams="application/x-ndjson"))
async def generate(request: Request) -> Response:
    service, body = service_of(request), body_of(request)
    if body.get("images") or body.get("suffix"):
        raise bad("only text is answered; leave out images and suffix")
    prompt, system = fields.text(body, "prompt"), fields.text(body, "system") or None
    raw = fields.flag(body, "raw")
    if not prompt:
        return await loaded(request, service, {"response": ""})
    asks.usable(prompt, "prompt")
    if raw:
        ask = ask_of(body, service.config, text=prompt)
    else:
        if system is not None:
            asks.usable(system, "system")
        ask = ask_of(body, service.config, prompt=user_prompt(prompt, system=system))
    return await answer(request, ask, "response")


async def loaded(request: Request, service: Service, content: dict[str, Any]) -> Response:
    """A request without a prompt asks for the model to be loaded, which it is."""
    service.decoder.check()
    name = ask_of(body_of(request), service.config).model or service.model_id
    return Json({"model": name, "created_at": now(), **content, "done": True, "done_reason": "load"})


def ask_of(body: Body, config: ServerConfig, *, prompt: Any = (), text: str | None = None) -> Ask:
    """The Ask of a request whose sampling fields stand in `options`."""
    options = fields.table(body, "options") or {}
    plain: Body = {ours: options[theirs] for theirs, ours in OPTIONS.items() if options.get(theirs) is not None}
    if plain.get("seed") == 0:
        del plain["seed"]  # what Ollama's clients send for "any"
    limit = fields.integer(options, "num_predict", -2, 1_000_000)
    if limit is not None and limit > 0:
        plain["max_tokens"] = limit
    plain |= {"model": model_of(body), "steering": body.get("steering")}
    plain["stream"] = fields.flag(body, "stream", default=True)
    schema, given = None, body.get("format")
    if given is not None and given != "":
        if given != "json" and not isinstance(given, dict):
            raise bad('format must be "json" or a JSON schema')
        schema = asks.checked_schema({"type": "object"} if given == "json" else given, config)
    return asks.common(plain, config, asks.sampled(plain, config), prompt=prompt, text=text, schema=schema)


async def answer(request: Request, ask: Ask, kind: str) -> Response:
    """`kind` "message" or "response": where the text stands."""
    service, started = service_of(request), time.perf_counter_ns()
    running = await service.running([ask], request.headers, caller_of(request), kind="ollama")
    if not ask.stream:
        await whole(request, running)
        text, calls = tool_calls.read("".join(running.choices[0].text), ask.tools, forced=ask.forced)
        return Json(last(running, kind, text, calls, started))
    parts = lines(running, kind, CallReader(ask.tools, ask.forced), started)
    return await streamed(request, running, parts, media_type="application/x-ndjson", broken=broken)


async def lines(running: Running, kind: str, reader: CallReader, started: int) -> AsyncIterator[bytes]:
    """Text as it is decoded, each call when it is whole."""
    async for _, event in running.events():
        before, ends = len(reader.calls), event.chunk.finish_reason is not None
        text = reader.feed(event.chunk.text) + (reader.finish() if ends else "")
        calls = reader.calls[before:]
        if ends:
            yield dump_json(last(running, kind, text, calls, started)) + b"\n"
        elif text or calls:
            yield dump_json(part(running, kind, text, calls)) + b"\n"


def broken(refusal: Refusal) -> bytes:
    return dump_json(refusal.body(ollama=True)) + b"\n"


def part(running: Running, kind: str, text: str, calls: Sequence[Call]) -> dict[str, Any]:
    content: Any = {"role": "assistant", "content": text} if kind == "message" else text
    if calls:
        content["tool_calls"] = [
            {"function": {"name": call.name, "arguments": json.loads(call.arguments)}} for call in calls
        ]
    name = running.asks[0].model or running.model
    return {"model": name, "created_at": now(), kind: content, "done": False}


def last(running: Running, kind: str, text: str, calls: Sequence[Call], started: int) -> dict[str, Any]:
    """The end, with costs in nanoseconds; `id` is for POST /v1/feedback."""
    prompt, decoded, _ = running.usage()
    stats = running.choices[0].stats
    total = time.perf_counter_ns() - started
    return part(running, kind, text, calls) | {
        "done": True,
        "done_reason": running.finish_reason(0),
        "total_duration": total,
        "load_duration": 0,
        "prompt_eval_count": prompt,
        "prompt_eval_duration": int(1e9 * stats.ttft_sec) if stats else 0,
        "eval_count": decoded,
        "eval_duration": int(1e9 * stats.generation_sec) if stats else 0,
        "id": running.id,
        "edge_align": running.about,
    }


@router.post("/api/embed", **takes(openapi.OLLAMA_EMBED))
async def api_embed(request: Request) -> Response:
    service, body = service_of(request), body_of(request)
    vectors, count = await embed(service, texts_of(body.get("input"), service.config))
    return Json({"model": model_of(body), "embeddings": vectors, "total_duration": 0, "prompt_eval_count": count})


@router.post("/api/embeddings", **takes(openapi.OLLAMA_EMBEDDINGS))
async def api_embeddings(request: Request) -> Response:
    """The older form: one text under `prompt`."""
    service, body = service_of(request), body_of(request)
    model_of(body)  # checked, and the only one there is
    vectors, _ = await embed(service, texts_of(body.get("prompt"), service.config))
    return Json({"embedding": vectors[0]})


def now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")
