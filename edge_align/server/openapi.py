"""What the OpenAPI document says of requests and refusals, for people who write clients and for tests.

The routes check their bodies themselves, in `asks` and `fields`: those know the limits of this server, say in a
sentence what is wrong, and ignore fields that nobody knows.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
FLAG: Schema = {"type": ["boolean", "null"]}
OBJECT: Schema = {"type": "object"}
MAYBE_TEXT: Schema = {"type": ["string", "null"]}
MAYBE_OBJECT: Schema = {"type": ["object", "null"]}


def number(low: float, high: float) -> Schema:
    return {"type": ["number", "null"], "minimum": low, "maximum": high}


def integer(low: int, high: int) -> Schema:
    return {"type": ["integer", "null"], "minimum": low, "maximum": high}


def many(of: Schema, *, least: int = 0) -> Schema:
    return {"type": "array", "items": of, "minItems": least}


def either(*schemas: Schema) -> Schema:
    return {"anyOf": list(schemas)}


def table(*required: str, **fields: Schema) -> Schema:
    return {"type": "object", "properties": fields, "required": list(required)}


STEERING: Schema = table(profile=MAYBE_TEXT, strength=number(-4, 4), enabled=FLAG) | {"type": ["object", "null"]}
TOKENS = many({"type": "integer", "minimum": 0}, least=1)
TEXTS = either(TEXT, TOKENS, many(either(TEXT, TOKENS), least=1))
PARTS = many(table("type", "text", type={"enum": ["text", "input_text", "output_text"]}, text=TEXT))
MESSAGE = table(
    "role",
    role={"enum": ["system", "developer", "user", "assistant", "tool"]},
    content=either(TEXT, PARTS, {"type": "null"}),
)
TOOL = table("type", "function", type={"const": "function"}, function=table("name", name=TEXT))
FUNCTION = table("type", "name", type={"const": "function"}, name=TEXT)
ITEM = either(
    MESSAGE,
    table(
        "type",
        "name",
        "arguments",
        type={"const": "function_call"},
        call_id=TEXT,
        name=TEXT,
        arguments=TEXT,
    ),
    table("type", "output", type={"const": "function_call_output"}, call_id=TEXT, output=either(TEXT, PARTS)),
)
SAMPLING: Schema = {
    "model": MAYBE_TEXT,
    "max_tokens": integer(1, 1_000_000),
    "temperature": number(0, 10),
    "top_p": number(0, 1),
    "top_k": integer(1, 1_000_000),
    "seed": integer(-(2**63), 2**64),
    "n": integer(1, 8),
    "stop": either({"type": ["string", "null"]}, many(TEXT)),
    "presence_penalty": number(-2, 2),
    "frequency_penalty": number(-2, 2),
    "logit_bias": MAYBE_OBJECT,
    "stream": FLAG,
    "stream_options": MAYBE_OBJECT,
    "steering": STEERING,
}
OLLAMA: Schema = {
    "model": MAYBE_TEXT,
    "options": MAYBE_OBJECT,
    "format": either({"type": "null"}, {"enum": ["", "json"]}, OBJECT),
    "stream": FLAG,
    "steering": STEERING,
}

CHAT = table(
    "messages",
    messages=many(MESSAGE, least=1),
    max_completion_tokens=integer(1, 1_000_000),
    logprobs=FLAG,
    top_logprobs=integer(0, 20),
    response_format=MAYBE_OBJECT,
    tools={"type": ["array", "null"], "items": TOOL},
    tool_choice=either({"enum": ["auto", "none", "required", None]}, TOOL),
    **SAMPLING,
)
COMPLETION = table("prompt", prompt=TEXTS, logprobs=integer(0, 5), **SAMPLING)
RESPONSE = table(
    "input",
    input=either(TEXT, many(ITEM, least=1)),
    instructions=MAYBE_TEXT,
    tools={"type": ["array", "null"], "items": FUNCTION},
    tool_choice=either({"enum": ["auto", "none", "required", None]}, FUNCTION),
    model=MAYBE_TEXT,
    max_output_tokens=integer(1, 1_000_000),
    temperature=number(0, 10),
    top_p=number(0, 1),
    text=MAYBE_OBJECT,
    stream=FLAG,
    steering=STEERING,
)
EMBEDDINGS = table(
    "input",
    input=TEXTS,
    model=MAYBE_TEXT,
    encoding_format={"enum": ["float", "base64", None]},
    dimensions=integer(1, 1 << 20),
)
OLLAMA_CHAT = table(messages=many(MESSAGE), tools={"type": ["array", "null"], "items": TOOL}, **OLLAMA)
OLLAMA_GENERATE = table(prompt=MAYBE_TEXT, system=MAYBE_TEXT, raw=FLAG, **OLLAMA)
OLLAMA_SHOW = table(model=MAYBE_TEXT, name=MAYBE_TEXT)
OLLAMA_EMBED = table("input", input=TEXTS, model=MAYBE_TEXT)
OLLAMA_EMBEDDINGS = table("prompt", prompt=TEXTS, model=MAYBE_TEXT)
CVECTORS = table("cvectors", cvectors=many(table("id", "scale", id=integer(0, 1_000_000), scale=number(-4, 4))))
FEEDBACK = table(
    "id",
    id=TEXT,
    index=integer(0, 1000),
    rating=either({"enum": ["up", "down", None]}, integer(1, 10)),
    edited=MAYBE_TEXT,
    preferred_over=MAYBE_TEXT,
    preferred_over_index=integer(0, 1000),
    reason=MAYBE_TEXT,
)
FORGET = table(
    profile=MAYBE_TEXT,
    rows={"type": ["array", "null"], "items": {"type": "integer", "minimum": 0}},
    matching=MAYBE_TEXT,
    everything=FLAG,
)

OPENAI_ERROR = table(
    "error", error=table("message", "type", "param", "code", message=TEXT, type=TEXT, param=MAYBE_TEXT, code=MAYBE_TEXT)
)
OLLAMA_ERROR = table("error", error=TEXT)
REFUSED = {
    400: "the request cannot be answered as it is",
    401: "an API key is needed",
    403: "a foreign host or origin, or another's profile",
    404: "no such model, profile, answer or route",
    405: "no such method here",
    408: "the request did not arrive in time",
    409: "not now",
    413: "the body is too large",
    415: "the body is not JSON",
    429: "the queue is full; Retry-After says when to come back",
    503: "the model is loading, or there are too many connections; Retry-After says when to come back",
}


def takes(schema: Schema, *, streams: str | None = None) -> dict[str, Any]:
    """For the decorator of a route: its JSON body, and the type of its answer where that can be a stream."""
    extra = {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
    return {"openapi_extra": extra} | (answers("application/json", streams) if streams else {})


def answers(*types: str) -> dict[str, Any]:
    """For the decorator of a route whose answer has another type than JSON."""
    return {"responses": {200: {"content": {one: {} for one in types}}}}


def refusals(*, ollama: bool = False) -> dict[int | str, dict[str, Any]]:
    """Of every route of a protocol."""
    schema = OLLAMA_ERROR if ollama else OPENAI_ERROR
    content = {"application/json": {"schema": schema}}
    return {status: {"description": text, "content": content} for status, text in REFUSED.items()}
