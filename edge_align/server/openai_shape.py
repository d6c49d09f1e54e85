"""Answers in the shape of OpenAI's API, with `timings` as llama-server names them."""

from __future__ import annotations

from typing import Any

from edge_align.records import GenerationStats, TokenLogprob
from edge_align.server import tools as tool_calls
from edge_align.server.decoder import Decoded
from edge_align.server.guard import dump_json
from edge_align.server.refusal import Refusal
from edge_align.server.service import Running
from edge_align.server.tools import Call, CallReader

DONE = b"data: [DONE]\n\n"


def sse(value: Any) -> bytes:
    return b"data: " + dump_json(value) + b"\n\n"


def broken(refusal: Refusal) -> bytes:
    """The part that ends a stream which cannot go on; SDKs raise it."""
    return sse(refusal.body(ollama=False))


def head(running: Running, kind: str) -> dict[str, Any]:
    return {"id": running.id, "object": kind, "created": running.created, "model": running.model}


def usage(running: Running) -> dict[str, Any]:
    prompt, decoded, cached = running.usage()
    return {
        "prompt_tokens": prompt,
        "completion_tokens": decoded,
        "total_tokens": prompt + decoded,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def timings(stats: GenerationStats | None) -> dict[str, Any] | None:
    """Costs of one answer; times in ms. `prompt_ms` runs to the first token."""
    if stats is None:
        return None
    prompt_n, prompt_ms = stats.prompt_tokens - stats.cached_tokens, 1e3 * stats.ttft_sec
    predicted_n, predicted_ms = stats.completion_tokens, 1e3 * stats.generation_sec
    return {
        "cache_n": stats.cached_tokens,
        "prompt_n": prompt_n,
        "prompt_ms": prompt_ms,
        "prompt_per_token_ms": prompt_ms / max(prompt_n, 1),
        "prompt_per_second": 1e3 * prompt_n / prompt_ms if prompt_ms else 0.0,
        "predicted_n": predicted_n,
        "predicted_ms": predicted_ms,
        "predicted_per_token_ms": predicted_ms / max(predicted_n, 1),
        "predicted_per_second": stats.generation_tps,
    }


def token_entry(token: int, logprob: float, names: dict[int, str]) -> dict[str, Any]:
    text = names.get(token, "")
    return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else [*text.encode()]}


def chat_logprobs(found: list[TokenLogprob], names: dict[int, str]) -> dict[str, Any]:
    entries = [
        token_entry(one.token, one.logprob, names)
        | {"top_logprobs": [token_entry(token, logprob, names) for token, logprob in one.top]}
        for one in found
    ]
    return {"content": entries, "refusal": None}


def text_logprobs(found: list[TokenLogprob], names: dict[int, str]) -> dict[str, Any]:
    """The older form of /v1/completions."""
    texts = [names.get(one.token, "") for one in found]
    offsets = [sum(map(len, texts[:i])) for i in range(len(texts))]
    return {
        "tokens": texts,
        "token_logprobs": [one.logprob for one in found],
        "top_logprobs": [{names.get(token, ""): logprob for token, logprob in one.top} for one in found],
        "text_offset": offsets,
    }


def chat_response(running: Running) -> dict[str, Any]:
    choices = []
    for i, choice in enumerate(running.choices):
        ask = running.asks[i]
        asked = ask.sampling.top_logprobs is not None
        text, calls = tool_calls.read("".join(choice.text), ask.tools, forced=ask.forced)
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message |= {"content": text or None, "tool_calls": [tool_call(call) for call in calls]}
        choices.append(
            {
                "index": i,
                "message": message,
                "logprobs": chat_logprobs(choice.logprobs, choice.names) if asked else None,
                "finish_reason": "tool_calls" if calls else running.finish_reason(i),
            }
        )
    return whole(running, "chat.completion", choices)


def text_response(running: Running) -> dict[str, Any]:
    choices = []
    for i, choice in enumerate(running.choices):
        asked = running.asks[i].sampling.top_logprobs is not None
        choices.append(
            {
                "index": i,
                "text": "".join(choice.text),
                "logprobs": text_logprobs(choice.logprobs, choice.names) if asked else None,
                "finish_reason": running.finish_reason(i),
            }
        )
    return whole(running, "text_completion", choices)


def whole(running: Running, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        **head(running, kind),
        "choices": choices,
        "usage": usage(running),
        "timings": timings(running.choices[0].stats),
        "edge_align": running.about,
    }


def tool_call(call: Call) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def chat_chunk(running: Running, index: int, event: Decoded, reader: CallReader) -> list[dict[str, Any]]:
    """The chunks of one decoded piece; a call of a tool, and the end of a choice, are each a chunk of its own."""
    chunk, base = event.chunk, head(running, "chat.completion.chunk")
    before = len(reader.calls)
    text = reader.feed(chunk.text) + ("" if chunk.finish_reason is None else reader.finish())
    asked = running.asks[index].sampling.top_logprobs is not None
    logprobs = chat_logprobs([*chunk.logprobs], event.names) if asked else None
    found = []
    if text or chunk.logprobs:
        found.append(_chat(base, index, {"content": text}, logprobs, None))
    for i, call in enumerate(reader.calls[before:], before):
        found.append(_chat(base, index, {"tool_calls": [{"index": i, **tool_call(call)}]}, None, None))
    if chunk.finish_reason is not None:
        finish = "tool_calls" if reader.calls else running.finish_reason(index)
        last = _chat(base, index, {}, None, finish)
        found.append(last | {"timings": timings(chunk.stats), "edge_align": running.about})
    return found


def chat_start(running: Running, index: int) -> dict[str, Any]:
    delta = {"role": "assistant", "content": ""}
    return _chat(head(running, "chat.completion.chunk"), index, delta, None, None)


def _chat(base: dict[str, Any], index: int, delta: Any, logprobs: Any, finish: str | None) -> dict[str, Any]:
    choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
    return {**base, "choices": [choice]}


def text_chunk(running: Running, index: int, event: Decoded) -> list[dict[str, Any]]:
    chunk = event.chunk
    asked = running.asks[index].sampling.top_logprobs is not None
    choice = {
        "index": index,
        "text": chunk.text,
        "logprobs": text_logprobs([*chunk.logprobs], event.names) if asked else None,
        "finish_reason": None if chunk.finish_reason is None else running.finish_reason(index),
    }
    more = {} if chunk.finish_reason is None else {"timings": timings(chunk.stats), "edge_align": running.about}
    return [{**head(running, "text_completion"), "choices": [choice], **more}]


def usage_chunk(running: Running, kind: str) -> dict[str, Any]:
    """The last chunk, sent only when it was asked for."""
    return {**head(running, kind), "choices": [], "usage": usage(running)}
